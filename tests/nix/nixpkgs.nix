# As little of nixpkgs as the files in nix/ call for: `lib`, and builders that give back what they
# were called with.
{
  system ? null,
  overlays ? [ ],
}:
let
  lib = {
    inherit (builtins) any concatMap;
    hasPrefix = prefix: text: builtins.substring 0 (builtins.stringLength prefix) text == prefix;
    optionals = condition: list: if condition then list else [ ];
    throwIfNot =
      condition: message: value:
      if condition then value else throw message;
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
    mkOption = option: option;
    literalMD = text: text;
    mkIf = condition: content: { inherit condition content; };
    mkForce = force: { inherit force; };
    mkDefault = default: { inherit default; };
    types = {
      package = "package";
      anything = "anything";
      attrsOf = of: { attrsOf = of; };
      enum = values: { enum = values; };
      nullOr = of: { nullOr = of; };
    };
  };

  pkgs = {
    inherit lib;
    stdenv.hostPlatform.system = "x86_64-linux";
    closureInfo = _: "/nix/store/00000000000000000000000000000000-closure-info";
    writeScript = name: text: {
      inherit name;
      outPath = text;
    };
    runCommand = name: attributes: script: { inherit name attributes script; };
    callPackage = path: _: {
      pname = "firn";
      inherit path;
      runNixOSTest = test: { inherit test; };
      agent = "/agent";
      outPath = "/firn";
    };
    extend =
      overlay:
      let
        final = pkgs // overlay final pkgs;
      in
      final;
  };
in
builtins.foldl' (set: set.extend) pkgs overlays
