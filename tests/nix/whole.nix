# A whole test of nixpkgs with a node that runs under QEMU, as far as evaluation goes. It needs all
# of nixpkgs:
#
#     NIX_REMOTE=dummy:// nix-instantiate --eval --strict --json whole.nix --argstr nixpkgs DIRECTORY
#
# The answer has the derivations of the test, its driver and its nodes, whether it is refused with
# `fallback = "error"`, which has to be so, and how a test that starts from a booted world differs.
{
  nixpkgs,
  test ? "systemd-credentials-tpm2",
}:
let
  # Debian's Nix 2.8 with what nixpkgs needs of 2.18.
  new = {
    nixVersion = "2.18.0";
    readFileType = path: (builtins.readDir (dirOf path)).${baseNameOf path};
  };
  scope = {
    builtins = builtins // new // { inherit (scope) import; };
    __nixVersion = new.nixVersion;
    import = builtins.scopedImport scope;
  };
  import' = if builtins ? readFileType then import else scope.import;

  # Written in Haskell, whose packages copies of nixpkgs for reading leave out.
  other = final: _: {
    shellcheck-minimal = final.hello // {
      compiler.bootstrapAvailable = false;
    };
    pandoc = final.shellcheck-minimal;
  };
  pkgs = import' (/. + nixpkgs) {
    system = "x86_64-linux";
    config = { };
    overlays = [
      other
      (import ../../nix/overlay.nix)
    ];
  };
  run =
    fallback:
    pkgs.firn.runNixOSTest {
      imports = [ (/. + "${nixpkgs}/nixos/tests/${test}.nix") ];
      defaults.virtualisation.firn = { inherit fallback; };
    };
  whole = run "qemu";
  fromBoot =
    more:
    pkgs.firn.runNixOSTest {
      imports = [
        (/. + "${nixpkgs}/nixos/tests/${test}.nix")
        more
      ];
      firn.fromBoot = true;
    };
  booted = fromBoot { };
  sameNodes = fromBoot (
    { lib, ... }:
    {
      name = lib.mkForce "other";
      testScript = lib.mkForce "";
    }
  );
in
{
  test = whole.drvPath;
  driver = whole.driver.drvPath;
  nodes = builtins.mapAttrs (_: node: node.system.build.vm.drvPath) whole.nodes;
  from-boot = {
    test = booted.drvPath;
    world = booted.bootedWorld.drvPath;
    starts-there = booted.config.rawTestDerivation.FIRN_WORLD == "${booted.bootedWorld}";
    is-of-the-nodes-only = booted.bootedWorld.drvPath == sameNodes.bootedWorld.drvPath;
  };
  refused = !(builtins.tryEval (run "error").driver.drvPath).success;
}
