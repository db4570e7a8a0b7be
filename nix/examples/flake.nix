# A flake with a test. `nix build .#ping` runs it, as `nix flake check` does;
# `nix build .#ping.driverInteractive` makes the driver that gives a prompt.
{
  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";
    # Where firn's repository is.
    firn.url = "path:/path/to/firn";
    firn.inputs.nixpkgs.follows = "nixpkgs";
  };

  outputs =
    {
      self,
      nixpkgs,
      firn,
    }:
    let
      pkgs = import nixpkgs {
        system = "x86_64-linux";
        overlays = [ firn.overlays.default ];
      };
    in
    {
      # It was `pkgs.testers.runNixOSTest`.
      packages.x86_64-linux.ping = pkgs.firn.runNixOSTest ./ping.nix;
      checks = self.packages;
    };
}
