# firn, and the driver of NixOS tests replaced by it. Nothing else: what guests are made of keeps its
# hashes.
final: _: {
  firn = final.callPackage ./package.nix { };
  nixos-test-driver = final.firn;
}
