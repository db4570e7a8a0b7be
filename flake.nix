{
  description = "Runs NixOS tests in one process, without QEMU";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      # Those that the monitor knows.
      forSystems = nixpkgs.lib.genAttrs [ "x86_64-linux" ];
      firnFor = system: import ./nix { pkgs = nixpkgs.legacyPackages.${system}; };
    in
    {
      # As `pkgs.testers.runNixOSTest`, with the package set to take machines from as first argument.
      lib.runNixOSTest = pkgs: (import ./nix { inherit pkgs; }).runNixOSTest;

      overlays.default = import ./nix/overlay.nix;

      # For `virtualisation.vmVariant.imports`: `nixos-rebuild build-vm` makes a machine of firn.
      nixosModules.default = ./nix/machine-module.nix;

      packages = forSystems (
        system:
        let
          inherit (firnFor system) firn;
        in
        {
          inherit firn;
          inherit (firn) agent;
          default = firn;
        }
      );

      checks = forSystems (
        system:
        let
          inherit (firnFor system) firn runNixOSTest;
        in
        {
          inherit firn;
          ping = runNixOSTest ./nix/examples/ping.nix;
          web = runNixOSTest ./nix/examples/web.nix;
        }
      );

      devShells = forSystems (
        system:
        let
          pkgs = nixpkgs.legacyPackages.${system};
        in
        {
          default = pkgs.mkShell {
            inputsFrom = [ self.packages.${system}.firn.module ];
            packages = [
              pkgs.clippy
              pkgs.rustfmt
              pkgs.nixfmt
              pkgs.qemu
            ];
          };
        }
      );
    };
}
