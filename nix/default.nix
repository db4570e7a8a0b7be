# firn without flakes: `import ./nix { inherit pkgs; }`.
{
  pkgs ? import <nixpkgs> { },
}:
let
  overlay = import ./overlay.nix;
  inherit (pkgs.extend overlay) firn;
in
{
  inherit firn overlay;
  # As `pkgs.testers.runNixOSTest`.
  inherit (firn) runNixOSTest;
  machineModule = ./machine-module.nix;
  testModule = ./test-module.nix;
}
