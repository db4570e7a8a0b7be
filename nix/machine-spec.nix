# From a NixOS node's options to firn's machine file: a function of plain attribute sets, which
# needs neither nixpkgs nor a system. `tests/nix` evaluates it, and firn's parser reads what came
# out.
{
  # `system.name`, which is also the name of the script that starts the machine.
  name,
  # What the test calls the node, for messages.
  node ? name,
  # The node's number among the test's nodes, from 1.
  number ? 1,
  # The guest's platform.
  system,
  # `system.build.toplevel`.
  toplevel,
  # The Nix database of what the guest has in its store: the closureInfo of `additionalPaths`.
  registration,
  # The closureInfo of all that, this database included.
  closure ? registration,
  # An image of the store, with `useNixStoreImage`.
  storeImage ? null,
  # `config.virtualisation`.
  virtualisation,
  # Those of `virtualisation.qemu`'s values that do not come from nixpkgs itself.
  qemuOptions ? [ ],
  qemuDrives ? [ ],
  qemuNetworkingOptions ? [ ],
  # The start script that nixpkgs makes, for a machine under QEMU.
  startScript ? null,
}:
let
  inherit (builtins)
    attrNames
    attrValues
    concatLists
    concatMap
    concatStringsSep
    elem
    elemAt
    filter
    genList
    head
    isAttrs
    isList
    isString
    length
    listToAttrs
    match
    replaceStrings
    split
    substring
    toString
    ;

  cfg = virtualisation;
  optional = condition: value: if condition then [ value ] else [ ];
  optionalAttrs = condition: set: if condition then set else { };
  imap = f: list: genList (i: f i (elemAt list i)) (length list);

  # Shell text, as the options of shares and drives have it, in the syntax of machine files:
  # `"$TMPDIR"/xchg` is `${TMPDIR}/xchg`. What only a shell can do is null.
  fromShell =
    text:
    let
      braced = concatStringsSep "" (
        map (part: if isList part then "\${${head part}}" else part) (
          split "\\$([A-Za-z_][A-Za-z0-9_]*)" text
        )
      );
      plain = replaceStrings [ "\"" ] [ "" ] braced;
      needsShell = match "(~.*|.*[][`'\\\\*?;|&<>()\n].*|.*[$]([^{].*)?)" plain != null;
    in
    # `split` drops the references to store paths; an empty part of the text has them all.
    if needsShell then null else substring 0 0 text + plain;

  # The cards on the test's vlans, in the order in which nixpkgs hands them to QEMU: by name. A system
  # that is no node of a test does not have these options.
  nets =
    let
      numbered = listToAttrs (
        imap (i: vlan: {
          name = "eth${toString (i + 1)}";
          value = { inherit vlan; };
        }) (cfg.vlans or [ ])
      );
    in
    attrValues (numbered // cfg.interfaces or { });
  vlans = map (net: net.vlan) nets;
  vlansFit = builtins.all (vlan: vlan >= 1 && vlan <= 254) vlans;
  vlansDiffer = length (attrNames (builtins.groupBy toString vlans)) == length vlans;

  inMemory = cfg.firn.storeImage or false;
  shares = map (
    tag:
    {
      inherit tag;
      source = fromShell cfg.sharedDirectories.${tag}.source;
    }
    // optionalAttrs (tag == "nix-store") {
      # Nothing that is in the store ever changes.
      read_only = true;
      cache = "always";
    }
    // optionalAttrs (tag == "nix-store" && (cfg.firn.closureOnly or false || inMemory)) {
      only = "${closure}/store-paths";
    }
    // optionalAttrs (tag == "nix-store" && inMemory) {
      image = true;
    }
    // optionalAttrs (tag == "certs" && cfg.useHostCerts or false) {
      copies."ca-certificates.crt" = "\${NIX_SSL_CERT_FILE:-}";
    }
  ) (attrNames cfg.sharedDirectories);

  # Files that are read at each start. How QEMU would hand them over is nothing that a guest sees.
  credentials = builtins.mapAttrs (
    _: given: if (given.source or null) == null then null else fromShell "${given.source}"
  ) (cfg.credentials or { });

  diskImage = if cfg.diskImage == null then null else fromShell cfg.diskImage;
  disks =
    optional (cfg.diskImage != null) (
      {
        image = "\${NIX_DISK_IMAGE:-${diskImage}}";
        size = cfg.diskSize;
        serial = "root";
      }
      // optionalAttrs cfg.useDefaultFilesystems { label = "nixos"; }
    )
    ++ optional cfg.useNixStoreImage {
      image = storeImage;
      format = "raw";
      read_only = true;
    }
    ++ imap (
      i: empty:
      let
        # Just a size, or newer a set with one.
        given = if builtins.isInt empty then { size = empty; } else empty;
      in
      {
        image = "\${TMPDIR}/empty${toString i}.qcow2";
        inherit (given) size;
      }
      // drive (given.driveConfig or { })
    ) cfg.emptyDiskImages
    ++ map (
      given:
      {
        image = fromShell given.file;
      }
      # An image that is made from one of the store has it below it; that is no secret.
      // optionalAttrs ((driveOptions given).format != "raw") { backing = [ builtins.storeDir ]; }
      // drive given
    ) qemuDrives;

  # What a drive's options for QEMU say of a disk.
  drive =
    given:
    let
      inherit (driveOptions given) format serial readonly;
    in
    optionalAttrs (format != null) { inherit format; }
    // optionalAttrs (serial != null) { inherit serial; }
    // optionalAttrs (readonly == "on") { read_only = true; };
  # What QEMU is told of a drive, without what has no meaning here.
  driveOptions =
    given:
    {
      format = null;
      serial = null;
      readonly = null;
    }
    // removeAttrs ((given.driveExtraOpts or { }) // (given.deviceExtraOpts or { })) [
      "bootindex"
      "cache"
      "werror"
    ];

  forwardPort =
    forward:
    let
      end =
        side: { inherit (side) port; } // optionalAttrs (side.address != "") { inherit (side) address; };
    in
    {
      inherit (forward) from proto;
      host = end forward.host;
      guest = end forward.guest;
    };
  # Tests without it set `networkingOptions` to the empty list.
  hasUserNetwork = cfg.qemu.networkingOptions != [ ];

  # The kernel's name in the environment, which a shell has to be able to spell.
  kernelVariable =
    "NIXPKGS_QEMU_KERNEL_"
    + concatStringsSep "" (map (part: if isList part then "_" else part) (split "[^A-Za-z0-9]" name));

  # Options of QEMU that ask for what a firn machine is anyway, or can be.
  knownOptions = {
    "-cpu host" = { };
    "-cpu max" = { };
    "-device virtio-rng-pci" = { };
    "-display none" = { };
    "-nographic" = { };
    "-device virtio-balloon" = {
      balloon = true;
    };
    "-device virtio-balloon-pci" = {
      balloon = true;
    };
  };
  # They come as single words, or as several in one string: one string for each option and its
  # value.
  givenOptions = filter (text: isString text && match " *" text == null) (
    split " *\n" (replaceStrings [ " -" ] [ "\n-" ] (" " + concatStringsSep " " qemuOptions))
  );
  # Those about a screen and what is typed on, which firn reads itself.
  plugged = "(,(id|bus)=[^,]+)*";
  keyboards = "-device (virtio-keyboard|virtio-keyboard-pci|usb-kbd)${plugged}";
  screens = concatStringsSep "|" [
    "-vga (std|virtio|none)"
    "-device (VGA|bochs-display|virtio-gpu|virtio-gpu-pci|virtio-vga)(,(xres|yres)=[0-9]+|,(id|bus)=[^,]+)*"
  ];
  inputs = concatStringsSep "|" [
    "-usb"
    keyboards
    "-device (virtio-tablet|virtio-tablet-pci|usb-tablet)${plugged}"
  ];
  given = pattern: filter (text: match pattern text != null) givenOptions;
  readOptions = given "${screens}|${inputs}";

  # Who wants another size than the usual one wants a screen.
  resolution =
    cfg.resolution or {
      x = 1024;
      y = 768;
    };
  screen =
    let
      wanted = cfg.firn.screen or null;
      sized = kind: {
        inherit kind;
        width = resolution.x;
        height = resolution.y;
      };
      usual = resolution.x == 1024 && resolution.y == 768;
    in
    if isString wanted then
      sized wanted
    else if wanted == null && !usual && given screens == [ ] then
      sized "plain"
    else
      wanted;
  parts = {
    inherit screen;
    keyboard = cfg.firn.keyboard or null;
    tablet = cfg.firn.tablet or null;
  };
  # What is null is left to what the test's script needs.
  knownParts = removeAttrs parts (filter (name: parts.${name} == null) (attrNames parts));

  fromOptions = builtins.foldl' (spec: text: spec // knownOptions.${text} or { }) { } givenOptions;

  settings = cfg.firn.settings or { };

  # What firn cannot do: the option, and why.
  because =
    condition: option: reason:
    optional condition "${option} ${reason}";
  unsupportedOfDrive =
    option: given:
    let
      options = driveOptions given;
      unknown = filter (
        key:
        !(elem key [
          "format"
          "readonly"
          "serial"
        ])
      ) (attrNames options);
    in
    because (
      unknown != [ ]
    ) option "has `${concatStringsSep "`, `" unknown}`, which is QEMU's and not firn's"
    ++ because (
      !(elem options.format [
        null
        "raw"
        "qcow2"
      ])
    ) option "has the format ${toString options.format}, and firn reads raw and qcow2"
    ++ because (
      !(elem options.readonly [
        null
        "on"
        "off"
      ])
    ) option "has readonly=${toString options.readonly}, and firn knows on and off";
  reasons = concatLists [
    (because (
      system != "x86_64-linux"
    ) "nixpkgs.hostPlatform" "is ${system}, and firn has machines of x86_64-linux only")
    (because cfg.useBootLoader "virtualisation.useBootLoader"
      "is not for firn, which has no firmware and starts the kernel itself"
    )
    (because cfg.useEFIBoot "virtualisation.useEFIBoot" "is not for firn, which has no firmware")
    (because (
      !cfg.directBoot.enable && !cfg.useBootLoader
    ) "virtualisation.directBoot.enable" "is false, and firn can only start the kernel itself")
    (because (cfg.bios or null != null) "virtualisation.bios" "is not for firn, which has no firmware")
    (because cfg.tpm.enable "virtualisation.tpm.enable" "asks for a TPM, which firn does not have")
    (concatMap (
      name:
      because (credentials.${name} == null) "virtualisation.credentials.${name}" (
        if cfg.credentials.${name}.source == null then
          "has neither text nor source"
        else
          "has the source ${cfg.credentials.${name}.source}, which only a shell understands"
      )
    ) (attrNames credentials))
    (because (cfg.qemu.diskInterface != "virtio") "virtualisation.qemu.diskInterface"
      "is ${cfg.qemu.diskInterface}, and firn has virtio disks only"
    )
    (because (
      cfg.cores > 32
    ) "virtualisation.cores" "is ${toString cfg.cores}, and a machine of firn has at most 32")
    (because (!vlansFit) "virtualisation.vlans" "has a number that is not one of 1 to 254")
    (because (!vlansDiffer) "virtualisation.vlans"
      "and virtualisation.interfaces have a vlan twice, and firn has one card on each"
    )
    (because (
      cfg.diskImage != null && diskImage == null
    ) "virtualisation.diskImage" "is ${cfg.diskImage}, which only a shell understands")
    (concatMap (
      share:
      because (share.source == null) "virtualisation.sharedDirectories.${share.tag}.source"
        "is ${cfg.sharedDirectories.${share.tag}.source}, which only a shell understands"
    ) shares)
    (concatMap (
      text:
      because (
        !(knownOptions ? ${text} || elem text readOptions)
      ) "virtualisation.qemu.options" "has `${text}`, which is QEMU's and not firn's"
    ) givenOptions)
    (concatMap (
      given:
      because (
        fromShell given.file == null
      ) "virtualisation.qemu.drives" "has the file ${given.file}, which only a shell understands"
      ++ unsupportedOfDrive "virtualisation.qemu.drives" given
    ) qemuDrives)
    (concatMap (
      empty: unsupportedOfDrive "virtualisation.emptyDiskImages" (empty.driveConfig or { })
    ) cfg.emptyDiskImages)
    (because (hasUserNetwork && qemuNetworkingOptions != [ ]) "virtualisation.qemu.networkingOptions"
      "is QEMU's: firn has its own user network, or with [ ] none"
    )
  ];
  unsupported = map (sentence: "node ${node}: ${sentence}") reasons;
in
{
  inherit unsupported;

  # Why it runs under QEMU, if it does.
  qemuReasons =
    if unsupported == [ ] then [ "node ${node}: virtualisation.firn.backend is qemu" ] else unsupported;

  # The machine under QEMU, as nixpkgs starts it.
  qemu = {
    firn = 1;
    inherit name number;
    backend = "qemu";
    start_command = startScript;
    because =
      if reasons == [ ] then
        [ "virtualisation.firn.backend" ]
      else
        # Machine files have variables in them, which these are not.
        map (replaceStrings [ "$" ] [ "$$" ]) reasons;
  }
  // optionalAttrs (vlansFit && vlansDiffer) { inherit vlans; };

  # Whether somebody types on it, as far as that is known before its test's script is read.
  keyboard = (parts // settings).keyboard == true || given keyboards != [ ];

  spec =
    if unsupported != [ ] then
      throw (concatStringsSep "\n" unsupported)
    else
      {
        firn = 1;
        # firn gives the cards the addresses by which NixOS knows them.
        inherit
          name
          number
          vlans
          shares
          disks
          ;
        inherit (cfg) cores;
        memory = cfg.memorySize;
        kernel = "\${${kernelVariable}:-${toplevel}/kernel}";
        initrd = [ cfg.directBoot.initrd ];
        # Known to the machine's start, not to its evaluation.
        cmdline_file = "${toplevel}/kernel-params";
        # Two searches of all of the kernel's symbols are left out: they are more than a tenth of
        # what a kernel does before its first program runs. The guest loses tidier names in
        # /sys/kernel/tracing: available_filter_functions lists functions that others have replaced,
        # and events' formats have constants' names for their numbers. A test's own
        # initcall_blacklist adds to this one.
        cmdline = concatStringsSep " " (
          [
            "initcall_blacklist=ftrace_check_for_weak_functions,trace_eval_init"
            "init=${toplevel}/init"
            "regInfo=${registration}/registration"
          ]
          ++ map (console: "console=${console}") cfg.qemu.consoles
          ++ [ "\${QEMU_KERNEL_PARAMS:-}" ]
        );
        qemu_opts = concatStringsSep " " (readOptions ++ [ "\${QEMU_OPTS:-}" ]);
      }
      // optionalAttrs (credentials != { }) { inherit credentials; }
      // knownParts
      // fromOptions
      // settings
      # Its keys one by one: who wants one of them still has what the other options say.
      // optionalAttrs (hasUserNetwork && isAttrs (settings.user_network or { })) {
        user_network = {
          restrict = cfg.restrictNetwork;
          forward_ports = map forwardPort cfg.forwardPorts;
          qemu_net_opts = "\${QEMU_NET_OPTS:-}";
        }
        // settings.user_network or { };
      };
}
