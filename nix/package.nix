# firn as nixpkgs has packages: the command, the driver of NixOS tests with its Python package, and
# in `agent` the agent for guests.
{
  lib,
  rustPlatform,
  python3Packages,
  makeWrapper,
  e2fsprogs,
  glibc,
  libcap_ng,
  tesseract,
  testers,
  # What the test framework asks of its driver.
  enableOCR ? false,
  extraPythonPackages ? (_: [ ]),
  # Accepted, and of no use: start scripts for QEMU name their own.
  qemu_pkg ? null,
  enableNspawn ? false,
}:
let
  inherit (lib.importTOML ../Cargo.toml) workspace;

  common = {
    inherit (workspace.package) version;
    src = lib.fileset.toSource {
      root = ../.;
      fileset = lib.fileset.unions [
        ../Cargo.lock
        ../Cargo.toml
        ../driver
        ../guest-agent
        ../net-switch
        # Members of the workspace, so cargo wants to read them.
        ../tests/Cargo.toml
        ../tests/benches
        ../tests/fuzz
        ../tests/src
        ../tests/tests
        ../vmm
      ];
    };
    # What the packages' tests need is here only in part, and `make test` runs them.
    doCheck = false;
    meta = {
      description = "Runs NixOS tests in one process, without QEMU";
      license = [
        lib.licenses.asl20
        lib.licenses.mit
      ];
      # Those that its monitor knows.
      platforms = [ "x86_64-linux" ];
      mainProgram = "firn";
    };
  };
  cargoLock.lockFile = ../Cargo.lock;

  agent = rustPlatform.buildRustPackage (
    common
    // {
      inherit cargoLock;
      pname = "firn-agent";
      cargoBuildFlags = [
        "-p"
        "firn-guest-agent"
      ];
      buildType = "agent";
      # Guests may have any libc, or none.
      env.RUSTFLAGS = "-C target-feature=+crt-static";
      buildInputs = [ glibc.static ];
    }
  );

  command = rustPlatform.buildRustPackage (
    common
    // {
      inherit cargoLock;
      pname = "firn-command";
      cargoBuildFlags = [
        "-p"
        "firn-cli"
      ];
      buildType = "dist";
      buildInputs = [ libcap_ng ];
    }
  );

  # Made once: nothing of what the framework asks for goes into it.
  module = python3Packages.buildPythonPackage (
    common
    // {
      pname = "firn-python";
      pyproject = true;
      buildAndTestSubdir = "driver";
      cargoDeps = rustPlatform.importCargoLock cargoLock;
      nativeBuildInputs = [
        rustPlatform.cargoSetupHook
        rustPlatform.maturinBuildHook
      ];
      buildInputs = [ libcap_ng ];
      dependencies = [
        python3Packages.ipython
      ];
      pythonImportsCheck = [
        "firn"
        "test_driver"
      ];
      # Its programs get what they need below.
      dontWrapPythonPrograms = true;
    }
  );

  # It makes ext4 file systems on new disks, and reads screens.
  path = lib.makeBinPath ([ e2fsprogs ] ++ lib.optional enableOCR tesseract);
in
# A test has containers; `test-module.nix` says which.
assert lib.assertMsg (!enableNspawn) "firn does not support containers yet";
python3Packages.buildPythonApplication {
  pname = "firn";
  inherit (common) version meta;
  pyproject = false;
  dontUnpack = true;
  nativeBuildInputs = [ makeWrapper ];
  dependencies = [ module ] ++ extraPythonPackages python3Packages;

  installPhase = ''
    runHook preInstall
    install -D -m 755 -t $out/bin ${module}/bin/*
    runHook postInstall
  '';
  makeWrapperArgs = [
    "--prefix"
    "PATH"
    ":"
    path
    "--set-default"
    "FIRN_AGENT"
    "${agent}/bin/firn-agent"
  ];
  postFixup = ''
    buildPythonPath "$out $pythonPath"
    makeWrapper ${command}/bin/firn $out/bin/firn \
      --prefix PATH : ${path} \
      --prefix PYTHONPATH : "$program_PYTHONPATH" \
      --set-default FIRN_AGENT ${agent}/bin/firn-agent \
      --set-default FIRN_PYTHON ${python3Packages.python.interpreter}
  '';

  passthru = {
    inherit agent module;
    # As `testers.runNixOSTest`, with firn.
    runNixOSTest =
      test:
      testers.runNixOSTest {
        imports = [
          ./test-module.nix
          test
        ];
      };
  };
}
