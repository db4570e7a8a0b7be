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
  inherit (lib) throwIfNot;
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
in
{
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
}
