# The test framework's side: every machine of the test is one of firn. All else of the framework
# stays as it is; `pkgs.nixos-test-driver`, which it calls, has to be firn's (`overlay.nix`).
{
  config,
  lib,
  options,
  hostPkgs,
  ...
}:
let
  inherit (lib) concatStringsSep mkOption throwIfNot;
  checked =
    throwIfNot (options ? pythonTestDriverPackage)
      "firn needs nixpkgs of March 2026 or newer, whose test framework takes another driver"
      (
        throwIfNot ((hostPkgs.nixos-test-driver.pname or null) == "firn")
          "test ${config.name}: its driver is not firn's; use `pkgs.firn.runNixOSTest` and firn's overlay"
          (
            throwIfNot (
              (config.containers or { }) == { }
            ) "test ${config.name}: firn does not support containers yet" { }
          )
      );

  # What keeps the machines' boot from being kept: QEMU's cannot be.
  underQemu = lib.concatMap (node: node.virtualisation.firn.qemuReasons) (
    lib.attrValues (config.nodes or { })
  );

  # Of nothing that only the script or the name decides: tests with the same nodes share it.
  bootedWorld =
    throwIfNot (underQemu == [ ])
      "test ${config.name}: it has no booted world, which `firn.fromBoot` starts from, as what runs under QEMU cannot be kept:\n${concatStringsSep "\n" underQemu}"
      keptWorld;
  keptWorld =
    let
      configuration = hostPkgs.writers.writeJSON "driverConfiguration.json" (
        config.driverConfiguration // { test_script = hostPkgs.writeText "no-script" ""; }
      );
    in
    hostPkgs.runCommand "firn-booted-world"
      {
        requiredSystemFeatures = lib.attrNames (
          lib.filterAttrs (_: wanted: wanted) config.requiredFeatures
        );
      }
      ''
        export LOGFILE=/dev/null
        ${config.pythonTestDriverPackage}/bin/nixos-test-driver \
          --config ${configuration} --keep-world $out
      '';
in
{
  options.firn = {
    fromBoot = mkOption {
      type = lib.types.bool;
      default = false;
      description = ''
        Whether the test's derivation starts from machines that have booted in a derivation of their
        own, `bootedWorld`, which remote builders and caches share as any other. Its script finds
        machines that are up. Where the world does not fit, as on another processor, the machines
        boot, and the log says why. A node under QEMU cannot have this.
      '';
    };

    bootedWorld = mkOption {
      type = lib.types.package;
      readOnly = true;
      description = ''
        The machines after their boot: memory, disks and devices. Whoever can read the store can read
        what was in the guests' memory.
      '';
    };
  };

  config = {
    firn = {
      inherit bootedWorld;
    };

    passthru = {
      inherit (config.firn) bootedWorld;
    };

    # What the framework makes of it, with one variable more, which the driver reads.
    rawTestDerivation = lib.mkIf config.firn.fromBoot (
      lib.mkForce (
        hostPkgs.stdenv.mkDerivation (
          final: config.rawTestDerivationArg final // { FIRN_WORLD = "${config.firn.bootedWorld}"; }
        )
      )
    );

    # Nothing is emulated then: neither what runs under QEMU, nor a carrier around it all.
    extraDriverArgs = lib.optionals (config.qemu.forceAccel or false) [
      "--accel"
      "kvm"
    ];
    # Nodes and containers have it, so that whatever a test has of them makes it say what is wrong.
    extraBaseModules = checked;
    # Unlike `nodeDefaults` this reaches also specialisations that inherit nothing.
    extraBaseNodeModules.imports = [
      ./machine-module.nix
    ]
    # What shall be read is shown, and what is asked there is answered.
    ++ lib.optional (config.enableOCR or false) {
      virtualisation.firn = {
        screen = lib.mkDefault "plain";
        keyboard = lib.mkDefault true;
      };
    };
  };
}
