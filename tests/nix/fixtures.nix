# Nodes as nixpkgs' options describe them, and what nix/machine-spec.nix makes of each: its machine
# file, or the sentences that say why there is none.
let
  machineSpec = import ../../nix/machine-spec.nix;

  inherit (import ./options.nix)
    storePath
    share
    defaults
    vmVariant
    ;

  usualShares = (defaults "").sharedDirectories;
  port = address: port: { inherit address port; };

  # Replaces options, and those in these two sets one by one.
  with' =
    old: new:
    old
    // builtins.mapAttrs (
      name: value: if name == "qemu" || name == "directBoot" then old.${name} // value else value
    ) new;

  evaluate =
    name: args:
    machineSpec (
      {
        inherit name;
        system = "x86_64-linux";
        toplevel = storePath "nixos-system-${name}";
        registration = storePath "closure-info";
      }
      // removeAttrs args [ "options" ]
      // {
        virtualisation = with' ((args.options or defaults) name) (args.virtualisation or { });
      }
    );

  supported = {
    plain = { };
    big = {
      number = 200;
      virtualisation = {
        memorySize = 8192;
        cores = 32;
      };
    };
    two-vlans = {
      number = 2;
      virtualisation.vlans = [
        2
        1
      ];
    };
    no-vlans.virtualisation.vlans = [ ];
    named-interfaces = {
      number = 17;
      virtualisation = {
        vlans = [ ];
        interfaces = {
          wan = {
            vlan = 254;
            assignIP = false;
          };
          lan = {
            vlan = 3;
            assignIP = true;
          };
        };
      };
    };
    shares.virtualisation.sharedDirectories = usualShares // {
      home = share "$HOME/src" "/src";
      data = share ''"''${DATA:-/var/empty}"'' "/data";
      fixed = share "${storePath "source"}/tests" "/tests";
    };
    own-closure = {
      closure = storePath "whole-closure-info";
      virtualisation.firn.closureOnly = true;
    };
    store-in-memory.virtualisation.firn.storeImage = true;
    disks.virtualisation = {
      diskSize = 4096;
      emptyDiskImages = [
        512
        {
          size = 20;
          driveConfig.deviceExtraOpts.serial = "journal";
        }
        {
          size = 30;
          driveConfig = {
            name = "kept";
            driveExtraOpts = {
              readonly = "on";
              cache = "none";
            };
            deviceExtraOpts.bootindex = "3";
          };
        }
      ];
    };
    tmpfs-root.virtualisation = {
      diskImage = null;
      emptyDiskImages = [ 64 ];
    };
    own-file-systems.virtualisation = {
      useDefaultFilesystems = false;
      diskImage = "$HOME/root.qcow2";
    };
    store-image = {
      storeImage = storePath "nix-store-image";
      virtualisation = {
        useNixStoreImage = true;
        emptyDiskImages = [ 64 ];
        # `mountHostNixStore` is false then.
        sharedDirectories = removeAttrs usualShares [ "nix-store" ];
      };
    };
    more-drives = {
      qemuDrives = [
        {
          file = "${storePath "iso"}/nixos.iso";
          driveExtraOpts = {
            format = "raw";
            readonly = "on";
            werror = "report";
          };
          deviceExtraOpts.serial = "cd";
        }
        { file = ''"$TMPDIR"/second.qcow2''; }
      ];
    };
    forwarded-ports.virtualisation.forwardPorts = [
      {
        from = "host";
        proto = "tcp";
        host = port "" 2222;
        guest = port "" 22;
      }
      {
        from = "host";
        proto = "udp";
        host = port "127.0.0.1" 5353;
        guest = port "10.0.2.15" 53;
      }
      {
        from = "guest";
        proto = "tcp";
        host = port "127.0.0.1" 80;
        guest = port "10.0.2.10" 8080;
      }
    ];
    restricted.virtualisation.restrictNetwork = true;
    no-user-network.virtualisation.qemu.networkingOptions = [ ];
    text-only.virtualisation.qemu.consoles = [
      "tty0"
      "ttyS0,115200n8"
    ];
    known-qemu-options.qemuOptions = [
      "-cpu"
      "max"
      "-nographic -device virtio-balloon"
    ];
    screens = {
      qemuOptions = [
        "-vga none -device virtio-gpu-pci,xres=720,yres=1440"
        "-usb"
        "-device"
        "virtio-keyboard-pci,id=keys"
      ];
      virtualisation.firn.tablet = true;
    };
    own-screen.virtualisation = {
      firn = {
        screen = "gpu";
        keyboard = false;
      };
      resolution = {
        x = 1920;
        y = 1080;
      };
    };
    no-screen.virtualisation.firn.screen = false;
    other-resolution.virtualisation.resolution = {
      x = 800;
      y = 600;
    };
    own-settings.virtualisation.firn.settings = {
      balloon = true;
      vsock = {
        cid = 7;
        socket = "\${TMPDIR}/vsock";
      };
      user_network.host_loopback = false;
    };

    vm-variant.options = vmVariant;
    # Older nixpkgs has no such options.
    no-credentials.options =
      name:
      removeAttrs (defaults name) [
        "credentials"
        "useHostCerts"
      ];
    certificates.virtualisation = {
      useHostCerts = true;
      sharedDirectories = usualShares // {
        certs = share ''"$TMPDIR"/certs'' "/etc/ssl/certs";
      };
    };
    # Another's share of that name is nothing special.
    own-certificates.virtualisation.sharedDirectories = usualShares // {
      certs = share "/etc/certs" "/certs";
    };
    credentials.virtualisation.credentials = {
      "ssh.key".source = storePath "ssh.key";
      # A start script runs in its state directory.
      token = {
        source = "./token";
        mechanism = "fw_cfg";
      };
      password.source = ''"$HOME"/password'';
    };

    other-name = {
      name = "web-1";
      node = "web.example";
    };
  };

  unsupported = {
    boot-loader.virtualisation = {
      useBootLoader = true;
      useEFIBoot = true;
      directBoot.enable = false;
    };
    # As most tests of boot loaders have it, which say no more.
    boot-loader-alone.virtualisation = {
      useBootLoader = true;
      directBoot.enable = false;
    };
    netboot.virtualisation.directBoot.enable = false;
    bios.virtualisation.bios = storePath "qboot";
    tpm.virtualisation.tpm.enable = true;
    bad-credentials.virtualisation.credentials = {
      none.source = null;
      made.source = "$(pass show made)";
    };
    bad-empty-disks.virtualisation.emptyDiskImages = [
      {
        size = 20;
        driveConfig.deviceExtraOpts.logical_block_size = "4096";
      }
      {
        size = 20;
        driveConfig.driveExtraOpts = {
          format = "vdi";
          readonly = "yes";
        };
      }
    ];
    arm.system = "aarch64-linux";
    scsi.virtualisation.qemu.diskInterface = "scsi";
    too-many-cores.virtualisation.cores = 64;
    vlan-zero.virtualisation.vlans = [ 0 ];
    vlan-twice.virtualisation.interfaces.more.vlan = 1;
    shell-disk.virtualisation.diskImage = "$(mktemp)";
    shell-share.virtualisation.sharedDirectories = usualShares // {
      a = share "`pwd`" "/a";
      b = share "~/b" "/b";
      c = share "$1/c" "/c";
    };
    qemu-options.qemuOptions = [
      "-vga qxl"
      "-device virtio-gpu-pci,blob=true"
      "-device"
      "usb-storage,drive=stick"
      "-cpu host"
    ];
    drives.qemuDrives = [
      {
        file = "*.img";
        driveExtraOpts.media = "cdrom";
      }
      {
        file = "/disk.img";
        driveExtraOpts.readonly = "yes";
      }
      {
        file = "/disk.vmdk";
        driveExtraOpts.format = "vmdk";
      }
    ];
    networking.qemuNetworkingOptions = [ "-net nic,netdev=user.0,model=e1000" ];
  };

  referencesOf = value: builtins.attrNames (builtins.getContext (builtins.toJSON value));
in
builtins.mapAttrs (name: args: rec {
  inherit (evaluate name args) spec;
  references = referencesOf spec;
}) supported
// builtins.mapAttrs (
  name: args:
  let
    machine = evaluate name (args // { startScript = "${storePath "vm"}/bin/run-${name}-vm"; });
  in
  {
    unsupported = {
      # Who wants firn's machine all the same is told so.
      error = if (builtins.tryEval machine.spec).success then [ ] else machine.unsupported;
      inherit (machine) qemu;
    };
    references = referencesOf machine.qemu;
  }
) unsupported
