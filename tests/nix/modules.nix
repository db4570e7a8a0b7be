# The files in nix/ that are about nixpkgs, evaluated with nixpkgs.nix in its place: this shows that
# they fit each other, and nothing about nixpkgs.
#
# A set of checks, each of them true.
let
  inherit (builtins)
    all
    attrNames
    replaceStrings
    tryEval
    ;

  pkgs = import <nixpkgs> { };
  inherit (pkgs) lib;
  extended = import <nixpkgs> { overlays = [ (import ../../nix/overlay.nix) ]; };

  # A node's options, with `file` the one that asks something of QEMU.
  machine =
    {
      file,
      virtualisation,
      testing ? { },
    }:
    let
      defined = value: {
        definitionsWithLocations = [
          {
            file = "/nixpkgs/nixos/modules/virtualisation/qemu-vm.nix";
            value = [ "-usb" ];
          }
          {
            file = "/nixpkgs/nixos/lib/testing/network.nix, via option extraBaseNodeModules";
            value = [ "-device virtio-net-pci" ];
          }
          {
            inherit file value;
          }
        ];
      };
      none.definitionsWithLocations = [ ];
      module = import ../../nix/machine-module.nix {
        inherit lib pkgs;
        modulesPath = "/nixpkgs/nixos/modules";
        options.system.build.definitionsWithLocations = [
          {
            file = "/home/nixos/modules/a.nix";
            value.vm = "/another-vm";
          }
          {
            file = "/nixpkgs/nixos/modules/virtualisation/build-vm.nix";
            value.vm._type = "override";
          }
          {
            file = "/nixpkgs/nixos/modules/virtualisation/qemu-vm.nix";
            value.vm = "/nixos-vm";
          }
        ];
        options.virtualisation.qemu = {
          options = defined [ "-vga qxl" ];
          drives = none;
          networkingOptions = none;
        };
        config = {
          networking.usePredictableInterfaceNames = false;
          system = {
            name = "plain";
            build.toplevel = "/nix/store/00000000000000000000000000000000-nixos-system-plain";
          };
          virtualisation = virtualisation // {
            host.pkgs = extended;
            additionalPaths = [ ];
            firn = {
              package = extended.firn;
              settings = { };
              fallback = "error";
              backend = "firn";
            }
            // virtualisation.firn or { };
          };
        }
        // testing;
      };
      merged = module.config;
    in
    # What it adds to the system if it runs in firn's own monitor, and the machine in both cases.
    builtins.elemAt merged 1
    // {
      vm = (builtins.head merged).system.build.vm.force;
      inherit ((builtins.head merged).virtualisation.firn) qemuReasons;
    };
  inherit (import ./options.nix) defaults vmVariant;
  plain = defaults "plain";
  # `a` is asked for what firn cannot do, `b` is not.
  a = machine {
    file = "/home/nixos/modules/a.nix";
    virtualisation = plain;
  };
  b = machine {
    file = "/nixpkgs/nixos/modules/b.nix";
    virtualisation = plain;
  };
  # `c` is no node of a test.
  c = machine {
    file = "/nixpkgs/nixos/modules/b.nix";
    virtualisation = vmVariant "plain";
  };
  build = node: node.vm;

  contains = text: part: replaceStrings [ part ] [ "" ] text != text;
  testModule =
    args:
    (import ../../nix/test-module.nix (
      {
        inherit lib;
        config.name = "a";
        options.pythonTestDriverPackage = { };
        hostPkgs = extended;
      }
      // args
    )).config;
  # A test that starts from a booted world, and what the framework has of it.
  bootedOnce =
    more:
    let
      config = {
        name = "a";
        driverConfiguration = {
          vms.m = {
            name = "m";
            start_script = "/run-m-vm";
          };
          vlans = [ 1 ];
          test_script = throw "it is not looked at";
        };
        pythonTestDriverPackage = extended.nixos-test-driver;
        rawTestDerivationArg = final: {
          name = "vm-test-run-a";
          own = final.name;
        };
        requiredFeatures = {
          kvm = true;
          nixos-test = true;
          devnet = false;
        };
        firn = {
          fromBoot = true;
          inherit (module.firn) bootedWorld;
        };
      }
      // more;
      module = testModule { inherit config; };
    in
    module;
  refuses = args: throws (testModule args).extraBaseModules;
  # What the framework is called with.
  testOf = test: {
    imports = [
      ../../nix/test-module.nix
      test
    ];
  };
  nameOf = called: (import (builtins.elemAt called.imports 1)).name;
  throws = value: !(tryEval value).success;

  flake = (import ../../flake.nix).outputs {
    self = flake;
    nixpkgs = {
      inherit lib;
      legacyPackages.x86_64-linux = pkgs;
    };
  };
in
{
  overlay-replaces-the-driver-only =
    attrNames (import ../../nix/overlay.nix extended pkgs) == [
      "firn"
      "nixos-test-driver"
    ];

  # The framework's call.
  package-takes-what-the-framework-passes =
    let
      driver = extended.nixos-test-driver.override {
        enableOCR = true;
        extraPythonPackages = packages: [ packages.numpy ];
        qemu_pkg = "/qemu";
        enableNspawn = false;
      };
    in
    driver.pname == "firn"
    && builtins.elem "/numpy" driver.dependencies
    && !builtins.elem "/numpy" extended.firn.dependencies
    # It is not built again for that.
    && driver.module == extended.firn.module
    && builtins.elem "/e2fsprogs:/tesseract" driver.makeWrapperArgs
    && contains driver.postFixup " --set-default FIRN_AGENT /firn-agent/bin/firn-agent ";
  # Start scripts name their QEMU, so that a test has it if one of its nodes needs it.
  qemu-comes-with-nodes-that-need-it =
    let
      driver = extended.nixos-test-driver.override { qemu_pkg = throw "it is not looked at"; };
      node =
        firn:
        (build (machine {
          file = "/nixpkgs/nixos/modules/b.nix";
          virtualisation = plain // {
            inherit firn;
          };
        })).script;
    in
    driver.makeWrapperArgs == extended.firn.makeWrapperArgs
    && driver.dependencies == extended.firn.dependencies
    && driver.postFixup == extended.firn.postFixup
    && !contains (node { }) "/nixos-vm"
    && contains (node { backend = "qemu"; }) "/nixos-vm/bin/run-plain-vm";
  driver-has-no-containers =
    throws
      (extended.nixos-test-driver.override { enableNspawn = true; }).pname;
  package-has-the-sources = extended.firn.module.src == ../..;
  package-is-of-this-version =
    extended.firn.version == (lib.importTOML ../../Cargo.toml).workspace.package.version;

  script-is-a-machine-file =
    let
      spec = builtins.fromJSON (builtins.readFile ./golden/plain.json);
    in
    contains (build b).script "#!/firn/bin/firn run\n${builtins.toJSON spec}\n";
  framework-finds-the-script = (build b).attributes.meta.mainProgram == "run-plain-vm";
  shares-are-virtio-fs =
    let
      inherit (b.content.virtualisation) fileSystems;
    in
    attrNames fileSystems == [
      "/nix/.ro-store"
      "/tmp/shared"
      "/tmp/xchg"
    ]
    && fileSystems."/nix/.ro-store".device.force == "nix-store"
    && all (mount: mount.fsType.force == "virtiofs") (builtins.attrValues fileSystems);
  store-in-memory-is-an-image =
    let
      system =
        (machine {
          file = "/nixpkgs/nixos/modules/b.nix";
          virtualisation = plain // {
            firn.storeImage = true;
          };
        }).content;
      inherit (system.virtualisation) fileSystems;
      store = fileSystems."/nix/.ro-store";
    in
    store.device.force == "/dev/disk/by-label/nix-store"
    && store.fsType.force == "erofs"
    &&
      store.options.force == [
        "ro"
        "dax=always"
      ]
    && fileSystems."/tmp/xchg".fsType.force == "virtiofs"
    && all (module: builtins.elem module system.boot.initrd.availableKernelModules) [
      "virtio_mmio"
      "virtio_pmem"
      "nd_pmem"
      "erofs"
    ];
  agent-is-a-service =
    b.content.systemd.services.firn-agent.serviceConfig.ExecStart
    == "/firn-agent/bin/firn-agent --port /dev/virtio-ports/org.firn.agent --console /dev/ttyS0 --early";
  agent-looks-where-units-say-how-the-system-is =
    let
      protocol = builtins.readFile ../../guest-agent/src/protocol/mod.rs;
      told =
        name:
        contains protocol "\"/run/${b.content.systemd.services.${name}.serviceConfig.RuntimeDirectory}\"";
    in
    told "firn-system-up" && told "firn-system-down";
  system-is-up-when-the-backdoor-would-come =
    let
      unit = b.content.systemd.services.firn-system-up;
    in
    unit.wantedBy == [ "multi-user.target" ] && !unit ? unitConfig && !unit ? after && !unit ? before;
  memory-that-runs-out-ends-a-command-only =
    let
      node = machine {
        file = "/nixpkgs/nixos/modules/b.nix";
        virtualisation = plain;
        testing.testing.backdoor = true;
      };
      inherit (node.content.systemd.services) backdoor firn-agent;
      limits = {
        OOMPolicy = "continue";
        TasksMax = "infinity";
        LimitNOFILE = "1024:524288";
      };
    in
    backdoor.condition
    && backdoor.content.serviceConfig == limits
    && firn-agent.serviceConfig // limits == firn-agent.serviceConfig
    && firn-agent.serviceConfig.OOMScoreAdjust == -1000;
  without-the-backdoor-there-is-none = !b.content.systemd.services.backdoor.condition;

  system-that-is-no-node-is-a-machine = contains (build c).script "\"vlans\":[]";
  store-image-depends-on-its-paths-only =
    let
      inherit
        (build (machine {
          file = "/nixpkgs/nixos/modules/b.nix";
          virtualisation = plain // {
            useNixStoreImage = true;
          };
        }))
        script
        ;
    in
    all (contains script) [
      " --sort=name "
      " --hard-dereference "
      " -U "
      " -T 0 "
    ];
  credentials-need-a-driver =
    let
      modules =
        credentials:
        (machine {
          file = "/nixpkgs/nixos/modules/b.nix";
          virtualisation = plain // {
            inherit credentials;
          };
        }).content.boot.initrd.availableKernelModules;
    in
    !builtins.elem "dmi_sysfs" (modules { })
    && builtins.elem "dmi_sysfs" (modules {
      key.source = "/key";
    });

  keyboard-works-in-stage-1-where-one-is-asked-for =
    let
      modules =
        firn:
        (machine {
          file = "/nixpkgs/nixos/modules/b.nix";
          virtualisation = plain // {
            inherit firn;
          };
        }).content.boot.initrd.availableKernelModules;
      has = firn: builtins.elem "virtio_input" (modules firn) && builtins.elem "evdev" (modules firn);
    in
    !has { }
    && !has { keyboard = false; }
    && has { keyboard = true; }
    && has { settings.keyboard = true; };

  what-others-ask-of-qemu-is-refused = a.condition && throws (build a).script;
  or-runs-under-qemu =
    let
      node = machine {
        file = "/home/nixos/modules/a.nix";
        virtualisation = plain // {
          firn.fallback = "qemu";
        };
      };
    in
    !node.condition
    && all (contains (build node).script) [
      "#!/firn/bin/firn run\n"
      "\"backend\":\"qemu\""
      "\"because\":[\"virtualisation.qemu.options has `-vga qxl`, which is QEMU's and not firn's\"]"
      "\"start_command\":\"/nixos-vm/bin/run-plain-vm\""
    ]
    && (build node).attributes.meta.mainProgram == "run-plain-vm"
    &&
      node.qemuReasons == [
        "node plain: virtualisation.qemu.options has `-vga qxl`, which is QEMU's and not firn's"
      ];
  fallback-is-qemu-unless-told-otherwise =
    (import ../../nix/machine-module.nix {
      inherit lib pkgs;
      modulesPath = "/nixpkgs/nixos/modules";
      config = throw "it is not looked at";
      options = throw "it is not looked at";
    }).options.virtualisation.firn.fallback.default == "qemu";
  what-is-told-to-runs-under-qemu =
    let
      node = machine {
        file = "/nixpkgs/nixos/modules/b.nix";
        virtualisation = plain // {
          firn.backend = "qemu";
        };
      };
    in
    !node.condition
    && contains (build node).script "\"because\":[\"virtualisation.firn.backend\"]"
    && node.qemuReasons == [ "node plain: virtualisation.firn.backend is qemu" ];
  what-firn-can-do-is-not-left-to-qemu =
    (machine {
      file = "/nixpkgs/nixos/modules/b.nix";
      virtualisation = plain // {
        firn.fallback = "qemu";
      };
    }).condition
    && b.qemuReasons == [ ];

  test-gets-the-machine-module =
    (testModule { }).extraBaseNodeModules.imports == [ ../../nix/machine-module.nix ] && !refuses { };
  test-that-reads-has-what-it-reads =
    let
      inherit
        (testModule {
          config = {
            name = "a";
            enableOCR = true;
          };
        })
        extraBaseNodeModules
        ;
    in
    builtins.elem {
      virtualisation.firn = {
        screen = lib.mkDefault "plain";
        keyboard = lib.mkDefault true;
      };
    } extraBaseNodeModules.imports;
  test-starts-from-a-booted-world =
    let
      raw = (bootedOnce { }).rawTestDerivation;
      made = raw.content.force;
    in
    raw.condition
    # The framework's own, with a variable more.
    && made.name == "vm-test-run-a"
    && made.own == made.name
    && made.FIRN_WORLD == "${(bootedOnce { }).firn.bootedWorld}"
    && (bootedOnce { }).passthru.bootedWorld.name == "firn-booted-world"
    && !(bootedOnce { firn.fromBoot = false; }).rawTestDerivation.condition;
  booted-world-is-refused-where-a-node-runs-under-qemu =
    let
      node = reasons: { virtualisation.firn.qemuReasons = reasons; };
      with' = nodes: bootedOnce { inherit nodes; };
      some = with' {
        m = node [ ];
        q = node [ "node q: virtualisation.firn.backend is qemu" ];
      };
    in
    throws some.rawTestDerivation.content.force.FIRN_WORLD
    && throws some.firn.bootedWorld
    && !throws (with' { m = node [ ]; }).firn.bootedWorld;
  booted-world-needs-what-the-test-needs =
    (bootedOnce { }).firn.bootedWorld.attributes.requiredSystemFeatures == [
      "kvm"
      "nixos-test"
    ];
  booted-world-is-kept-by-the-driver = all (contains (bootedOnce { }).firn.bootedWorld.script) [
    "/firn/bin/nixos-test-driver "
    "\"vlans\":[1]"
    "\"vms\":{\"m\":{\"name\":\"m\",\"start_script\":\"/run-m-vm\"}}"
    " --keep-world $out"
  ];
  # Tests that differ in these only have the same world.
  booted-world-is-of-the-nodes-only =
    (bootedOnce { }).firn.bootedWorld == (bootedOnce { name = "b"; }).firn.bootedWorld
    && contains (bootedOnce { }).firn.bootedWorld.script "\"test_script\":\"/no-script\"";
  test-that-forces-acceleration-has-no-carrier =
    (testModule {
      config = {
        name = "a";
        qemu.forceAccel = true;
      };
    }).extraDriverArgs == [
      "--accel"
      "kvm"
    ]
    && (testModule { }).extraDriverArgs == [ ];
  test-needs-firns-driver = refuses { hostPkgs = pkgs; };
  test-needs-a-new-nixpkgs = refuses { options = { }; };
  # What containers have as well as nodes says it: a test may have nothing but containers.
  test-has-no-containers = refuses {
    config = {
      name = "a";
      containers.c = throw "it is not looked at";
    };
  };

  flake-has-what-it-should =
    attrNames flake == [
      "checks"
      "devShells"
      "lib"
      "nixosModules"
      "overlays"
      "packages"
    ]
    &&
      attrNames flake.checks.x86_64-linux == [
        "firn"
        "ping"
        "web"
      ]
    && flake.packages.x86_64-linux.default.outPath == "/firn"
    && flake.lib.runNixOSTest pkgs "a test" == testOf "a test";
  flake-runs-its-examples = all (name: nameOf flake.checks.x86_64-linux.${name} == name) [
    "ping"
    "web"
  ];
  examples-run-the-example =
    let
      example = (import ../../nix/examples/flake.nix).outputs {
        self = example;
        nixpkgs = <nixpkgs>;
        firn = flake;
      };
      test = testOf ../../nix/examples/ping.nix;
    in
    example.checks.x86_64-linux.ping == test && import ../../nix/examples/default.nix == test;
}
