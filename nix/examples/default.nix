# A test without flakes: `nix-build` runs it, `nix-build -A driverInteractive` makes the driver that
# gives a prompt.
let
  pkgs = import <nixpkgs> { overlays = [ (import ../overlay.nix) ]; };
in
# It was `pkgs.testers.runNixOSTest`.
pkgs.firn.runNixOSTest ./ping.nix
