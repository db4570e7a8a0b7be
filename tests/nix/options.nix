# The options of a node, as nixpkgs' modules leave them.
rec {
  # Paths of a Nix store, with references to it as real ones have.
  storePath =
    name:
    let
      path = "/nix/store/00000000000000000000000000000000-${name}";
    in
    builtins.appendContext path { ${path}.path = true; };

  # The options' values in a test's node that sets none of them.
  defaults =
    name:
    vmVariant name
    // {
      vlans = [ 1 ];
      interfaces = { };
      test = {
        nodeName = name;
        nodeNumber = 1;
      };
    };

  # Those in a system that is no node of a test: of `virtualisation.vmVariant`.
  vmVariant = name: {
    memorySize = 1024;
    cores = 1;
    resolution = {
      x = 1024;
      y = 768;
    };
    diskImage = "./${name}.qcow2";
    diskSize = 1024;
    emptyDiskImages = [ ];
    useDefaultFilesystems = true;
    useNixStoreImage = false;
    forwardPorts = [ ];
    restrictNetwork = false;
    useBootLoader = false;
    useEFIBoot = false;
    useHostCerts = false;
    credentials = { };
    bios = null;
    tpm.enable = false;
    directBoot = {
      enable = true;
      initrd = "${storePath "initrd"}/initrd";
    };
    sharedDirectories = {
      nix-store = share "/nix/store" "/nix/.ro-store";
      xchg = share ''"$TMPDIR"/xchg'' "/tmp/xchg";
      shared = share ''"''${SHARED_DIR:-$TMPDIR/xchg}"'' "/tmp/shared";
    };
    qemu = {
      diskInterface = "virtio";
      consoles = [
        "ttyS0,115200n8"
        "tty0"
      ];
      networkingOptions = [
        "-net nic,netdev=user.0,model=virtio"
        ''-netdev user,id=user.0,"$QEMU_NET_OPTS"''
      ];
    };
  };
  share = source: target: {
    inherit source target;
    securityModel = "none";
  };
}
