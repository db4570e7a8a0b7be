# The NixOS side of a machine of firn: `system.build.vm` is a machine file instead of a start script
# for QEMU, and the system finds what firn has. For nodes of tests (`test-module.nix` brings it) and
# for any system that has nixpkgs' qemu-vm.nix.
{
  config,
  lib,
  modulesPath,
  options,
  pkgs,
  ...
}:
let
  cfg = config.virtualisation;
  hostPkgs = cfg.host.pkgs;
  inherit (config.system) name;
  inherit (config.system.build) toplevel;

  registration = hostPkgs.closureInfo { rootPaths = cfg.additionalPaths; };

  # The system needs the database itself, too.
  closure = hostPkgs.closureInfo { rootPaths = cfg.additionalPaths ++ [ registration ]; };

  # What nixpkgs itself tells QEMU follows from other options, which machine-spec.nix reads; what
  # others tell it is what somebody wants of QEMU.
  ofNixpkgs =
    file:
    let
      modules = toString modulesPath;
    in
    lib.any (directory: lib.hasPrefix directory (toString file)) [
      "${modules}/"
      "${dirOf modules}/lib/"
    ];
  fromOthers =
    option:
    lib.concatMap (
      definition: lib.optionals (!ofNixpkgs definition.file) definition.value
    ) option.definitionsWithLocations;

  machine = import ./machine-spec.nix {
    inherit
      name
      toplevel
      registration
      closure
      ;
    node = cfg.test.nodeName or name;
    number = cfg.test.nodeNumber or 1;
    inherit (pkgs.stdenv.hostPlatform) system;
    storeImage = if cfg.useNixStoreImage then storeImage else null;
    virtualisation = cfg;
    qemuOptions = fromOthers options.virtualisation.qemu.options;
    qemuDrives = fromOthers options.virtualisation.qemu.drives;
    qemuNetworkingOptions = fromOthers options.virtualisation.qemu.networkingOptions;
    startScript = "${vmOfNixpkgs}/bin/run-${name}-vm";
  };

  # The machine as qemu-vm.nix makes it, which this module replaces; others only pass it on.
  vmOfNixpkgs =
    (lib.findFirst (
      definition: ofNixpkgs definition.file && definition.value ? vm && !(definition.value.vm ? _type)
    ) (throw "${name}: nixpkgs makes no machine") options.system.build.definitionsWithLocations)
    .value.vm;

  # As qemu-vm.nix makes it at each start, but made once.
  storeImage =
    let
      closure = hostPkgs.closureInfo {
        rootPaths = [
          toplevel
          registration
        ];
      };
    in
    hostPkgs.runCommand "nix-store-image" { nativeBuildInputs = [ hostPkgs.erofs-utils ]; } ''
      cd ${builtins.storeDir}
      # The same paths give the same image: neither the directories' order on this disk nor which
      # files Nix has linked to each other gets into it.
      sed 's|.*/||' ${closure}/store-paths |
        tar --create --sort=name --hard-dereference --files-from=- |
        mkfs.erofs --quiet -L nix-store -U 8a1c6d2e-5b0f-4c57-9f3e-6669726e0001 -T 0 \
          --force-uid=0 --force-gid=0 --tar=f "$out"
    '';

  script = hostPkgs.writeScript "run-${name}-vm" ''
    #!${cfg.firn.package}/bin/firn run
    ${builtins.toJSON (if underQemu then machine.qemu else machine.spec)}
  '';

  vm =
    hostPkgs.runCommand "firn-vm-${name}"
      {
        preferLocalBuild = true;
        # By this the test framework finds the script.
        meta.mainProgram = "run-${name}-vm";
      }
      ''
        mkdir -p $out/bin
        ln -s ${toplevel} $out/system
        ln -s ${script} $out/bin/run-${name}-vm
      '';

  # A command that runs out of memory ends alone, and a test may start as many as it likes.
  limits = {
    OOMPolicy = "continue";
    TasksMax = "infinity";
    LimitNOFILE = "1024:524288";
  };

  # A directory in /run that is there as long as the unit is active.
  state =
    name: unit:
    unit
    // {
      restartIfChanged = false;
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
        ExecStart = "${pkgs.coreutils}/bin/true";
        RuntimeDirectory = name;
      }
      // unit.serviceConfig or { };
    };

  underQemu = cfg.firn.backend == "qemu" || cfg.firn.fallback == "qemu" && machine.unsupported != [ ];

  # Whether the machine has the store in its memory.
  inMemory = cfg.firn.storeImage or false && cfg.sharedDirectories ? nix-store;

  # What the system of a machine in firn's own monitor has to have.
  firnsOwn = {
    # Shares are virtio-fs, also where nixpkgs still mounts them by 9p. Stage 1 with systemd waits for
    # no device of theirs, so the drivers have to be there; stage 1 without it leaves `x-` options out.
    boot.initrd.availableKernelModules = [
      "virtio_mmio"
      "virtiofs"
    ]
    # The store in memory: udev loads these once it finds such a device.
    ++ lib.optionals inMemory [
      "virtio_pmem"
      "nd_pmem"
      "erofs"
    ]
    # By it systemd reads credentials from the firmware's tables, also in stage 1.
    ++ lib.optional (cfg.credentials or { } != { }) "dmi_sysfs"
    # Passphrases are typed in stage 1.
    ++ lib.optionals machine.keyboard [
      "virtio_input"
      "evdev"
    ];
    virtualisation.fileSystems = lib.mapAttrs' (
      tag: share:
      lib.nameValuePair share.target (
        if tag == "nix-store" && inMemory then
          {
            # The image's label, by which stage 1 waits for it.
            device = lib.mkForce "/dev/disk/by-label/${tag}";
            fsType = lib.mkForce "erofs";
            options = lib.mkForce [
              "ro"
              # Otherwise the guest would keep copies of what it reads.
              "dax=always"
            ];
          }
        else
          {
            device = lib.mkForce tag;
            fsType = lib.mkForce "virtiofs";
            options = lib.mkForce [
              "defaults"
              "x-systemd.requires=modprobe@virtio_mmio.service"
              "x-systemd.requires=modprobe@virtiofs.service"
            ];
          }
      )
    ) cfg.sharedDirectories;

    # qemu-vm.nix turns them off: who turns them on again may expect some.
    warnings = lib.optional config.networking.usePredictableInterfaceNames ''
      ${name}: networking.usePredictableInterfaceNames gives firn's cards other names than QEMU's, which are on a PCI bus.
    '';

    # There from the start of the system to its very end; the backdoor stays beside it.
    systemd.services.firn-agent = {
      description = "firn's agent";
      wantedBy = [
        "sysinit.target"
        "emergency.target"
      ];
      unitConfig.DefaultDependencies = false;
      # Switching to another configuration must not cut the driver off.
      restartIfChanged = false;
      serviceConfig = {
        # It waits for its port by itself.
        ExecStart =
          "${cfg.firn.package.agent}/bin/firn-agent --port /dev/virtio-ports/org.firn.agent"
          # Where the backdoor's commands complain, too, whatever becomes of the journal.
          + " --console /dev/ttyS0 --early";
        Restart = "always";
        RestartSec = "100ms";
        # Commands that it has started outlive it.
        KillMode = "process";
        # The agent gives its commands a score of 0 again.
        OOMScoreAdjust = -1000;
      }
      // limits;
    };

    # The agent is there early, but the driver leaves a script's commands until what the backdoor
    # waits for, too: tests rely on it.
    systemd.services.firn-system-up = state "firn-system-up" {
      description = "The system is up, for firn's agent";
      wantedBy = [ "multi-user.target" ];
      # Of the units that may start now systemd starts the nicest last: commands do not wait for
      # those that they do not need.
      serviceConfig.Nice = -20;
    };
    systemd.services.firn-system-down = state "firn-system-down" {
      description = "The system waits to be mended, for firn's agent";
      wantedBy = [
        "emergency.target"
        "rescue.target"
      ];
      unitConfig.DefaultDependencies = false;
    };
    systemd.services.backdoor = lib.mkIf (config.testing.backdoor or (options ? testing)) {
      serviceConfig = limits;
    };

    # It would wait for a port that is QEMU's.
    virtualisation.qemu.guestAgent.enable = lib.mkDefault false;
  };
in
{
  options.virtualisation.firn = {
    package = lib.mkOption {
      type = lib.types.package;
      default = hostPkgs.firn or (hostPkgs.callPackage ./package.nix { });
      defaultText = lib.literalMD "`firn` of the host's packages";
      description = "The firn that runs this machine, and whose agent is in it.";
    };

    settings = lib.mkOption {
      type = lib.types.attrsOf lib.types.anything;
      default = { };
      example = {
        balloon = true;
      };
      description = ''
        Keys of the machine file, which replace those made from other options: what only firn has.
        Those of `user_network` are replaced one by one.
      '';
    };

    screen = lib.mkOption {
      type = lib.types.nullOr (
        lib.types.enum [
          "plain"
          "gpu"
          false
        ]
      );
      default = null;
      description = ''
        The machine's screen, of `virtualisation.resolution`: "plain" is a frame buffer on which every
        kernel draws without a driver of its own, "gpu" a virtio graphics card without 3D, for
        Wayland compositors. With null the machine has a plain one if the test sets `enableOCR`, if its
        script calls what needs one by name, or at the interactive prompt. QEMU's options `-vga` and
        `-device virtio-gpu-pci` in `virtualisation.qemu.options` are heeded first.
      '';
    };

    keyboard = lib.mkOption {
      type = lib.types.nullOr lib.types.bool;
      default = null;
      description = ''
        Whether the machine has a keyboard. With null it has one if the test sets `enableOCR`, if its
        script calls `send_key` or `send_chars` by name, or at the interactive prompt. Stage 1 has the
        keyboard's drivers only with true or `enableOCR`.
      '';
    };

    tablet = lib.mkOption {
      type = lib.types.nullOr lib.types.bool;
      default = null;
      description = ''
        Whether the machine has a tablet, a pointer that goes to places of the screen. With null it has
        one if its script sends QEMU's `input-send-event`, or at the interactive prompt.
      '';
    };

    closureOnly = lib.mkOption {
      type = lib.types.bool;
      default = false;
      description = ''
        Whether the machine sees of the host's store only what is its own: the closure of its system
        and of `virtualisation.additionalPaths`. What it lacks is missed outside of Nix's sandbox, too.
      '';
    };

    storeImage = lib.mkOption {
      type = lib.types.bool;
      default = false;
      description = ''
        Whether the machine has its closure in its memory, as an image that firn makes at the start and
        that all machines of a test with the same closure have in common: they read and execute it
        without copies of their own. For each GiB of it the guest needs 16 MiB of memory for its books. Where
        the host or the guest has no room for the image, the machine does not start, and the log says why.
        What it lacks is missed outside of Nix's sandbox, too, as with `closureOnly`.
      '';
    };

    fallback = lib.mkOption {
      type = lib.types.enum [
        "qemu"
        "error"
      ];
      default = "qemu";
      description = ''
        What becomes of this machine if it asks for what firn cannot do: with "qemu" it runs under
        QEMU, as nixpkgs makes it, and the test's log says why; with "error" the evaluation fails and
        says why.
      '';
    };

    backend = lib.mkOption {
      type = lib.types.enum [
        "firn"
        "qemu"
      ];
      default = "firn";
      description = ''
        What runs this machine: with "qemu" it runs under QEMU whatever it asks for.
      '';
    };

    qemuReasons = lib.mkOption {
      type = lib.types.listOf lib.types.str;
      internal = true;
      readOnly = true;
      description = "Why this machine runs under QEMU; empty if it does not.";
    };
  };

  config = lib.mkMerge [
    {
      system.build.vm = lib.mkForce vm;
      virtualisation.firn.qemuReasons = if underQemu then machine.qemuReasons else [ ];
    }
    (lib.mkIf (!underQemu) firnsOwn)
  ];
}
