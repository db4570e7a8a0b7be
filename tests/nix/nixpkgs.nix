# As little of nixpkgs as the files in nix/ call for: `lib`, and builders that give back what they
# were called with.
{
  system ? null,
  overlays ? [ ],
}:
let
  lib = {
    inherit (builtins)
      any
      attrNames
      attrValues
      concatMap
      concatStringsSep
      ;
    hasPrefix = prefix: text: builtins.substring 0 (builtins.stringLength prefix) text == prefix;
    optionals = condition: list: if condition then list else [ ];
    throwIfNot =
      condition: message: value:
      if condition then value else throw message;
    assertMsg = condition: message: if condition then true else throw message;
    filterAttrs =
      wanted: set:
      builtins.removeAttrs set (
        builtins.filter (name: !wanted name set.${name}) (builtins.attrNames set)
      );
    genAttrs =
      names: value:
      builtins.listToAttrs (
        map (name: {
          inherit name;
          value = value name;
        }) names
      );
    nameValuePair = name: value: { inherit name value; };
    mapAttrs' = f: set: builtins.listToAttrs (builtins.attrValues (builtins.mapAttrs f set));
    optional = condition: value: if condition then [ value ] else [ ];
    makeBinPath = builtins.concatStringsSep ":";
    importTOML = file: builtins.fromTOML (builtins.readFile file);
    fileset = {
      unions = paths: paths;
      # As the real one, it refuses what is not there.
      toSource =
        { root, fileset }:
        assert builtins.all builtins.pathExists fileset;
        root;
    };
    licenses = {
      asl20 = "Apache-2.0";
      mit = "MIT";
    };
    mkOption = option: option;
    literalMD = text: text;
    mkIf = condition: content: { inherit condition content; };
    mkMerge = merged: merged;
    findFirst =
      wanted: none: list:
      let
        found = builtins.filter wanted list;
      in
      if found == [ ] then none else builtins.head found;
    mkForce = force: { inherit force; };
    mkDefault = default: { inherit default; };
    types = {
      package = "package";
      anything = "anything";
      bool = "bool";
      attrsOf = of: { attrsOf = of; };
      enum = values: { enum = values; };
      nullOr = of: { nullOr = of; };
    };
  };

  package =
    attributes: attributes // attributes.passthru or { } // { outPath = "/${attributes.pname}"; };

  pkgs = {
    inherit lib;
    stdenv = {
      hostPlatform.system = "x86_64-linux";
      mkDerivation =
        attributes:
        let
          final = attributes final;
        in
        final;
    };
    closureInfo = _: "/nix/store/00000000000000000000000000000000-closure-info";
    writeScript = name: text: {
      inherit name;
      outPath = text;
    };
    runCommand = name: attributes: script: {
      inherit name attributes script;
      outPath = script;
    };
    writeText = name: _: "/${name}";
    writers.writeJSON = _: builtins.toJSON;
    e2fsprogs = "/e2fsprogs";
    erofs-utils = "/erofs-utils";
    glibc.static = "/glibc-static";
    libcap_ng = "/libcap-ng";
    makeWrapper = "/make-wrapper";
    tesseract = "/tesseract";
    rustPlatform = {
      buildRustPackage = package;
      importCargoLock =
        { lockFile }:
        assert builtins.pathExists lockFile;
        "/cargo-deps";
      cargoSetupHook = "/cargo-setup-hook";
      maturinBuildHook = "/maturin-build-hook";
    };
    python3Packages = {
      buildPythonApplication = package;
      buildPythonPackage = package;
      ipython = "/ipython";
      numpy = "/numpy";
      python.interpreter = "/python3";
    };
    testers.runNixOSTest = test: test;
    extend =
      overlay:
      let
        callPackage =
          path: arguments:
          let
            function = import path;
            call =
              arguments:
              function (builtins.intersectAttrs (builtins.functionArgs function) final // arguments)
              // {
                override = more: call (arguments // more);
              };
          in
          call arguments;
        final = pkgs // { inherit callPackage; } // overlay final pkgs;
      in
      final;
  };
in
builtins.foldl' (set: set.extend) pkgs overlays
