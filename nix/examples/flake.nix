# A flake with a test. `nix flake check` runs it;
# `nix build .#checks.x86_64-linux.ping.driverInteractive` makes the driver that gives a prompt.
{
  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";
    # Where firn's repository is.
    firn.url = "path:/path/to/firn";
    firn.inputs.nixpkgs.follows = "nixpkgs";
  };

  outputs =
    { nixpkgs, firn, ... }:
    let
      pkgs = import nixpkgs {
        system = "x86_64-linux";
        overlays = [ firn.overlays.default ];
      };
    in
    {
      # It was `pkgs.testers.runNixOSTest`.
      checks.x86_64-linux.ping = pkgs.firn.runNixOSTest ./ping.nix;
    };
}
