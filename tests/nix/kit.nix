# The kit `systemd` as a node, whose store is `store` on the host.
{ name, store }:
let
  inherit (import ./options.nix) defaults share;
  options = defaults name;

  # A NixOS system has the same paths in the guest as on the host.
  guest = "/nix/store/toplevel";
  host = "${store}/toplevel";
in
(import ../../nix/machine-spec.nix {
  inherit name;
  number = 5;
  system = "x86_64-linux";
  toplevel = guest;
  registration = "/nix/store/none";
  virtualisation = options // {
    diskSize = 64;
    emptyDiskImages = [
      {
        size = 20;
        driveConfig.deviceExtraOpts.serial = "data";
      }
    ];
    vlans = [
      2
      1
    ];
    sharedDirectories = options.sharedDirectories // {
      nix-store = share store "/nix/.ro-store";
      certs = share ''"$TMPDIR"/certs'' "/etc/ssl/certs";
    };
    useHostCerts = true;
    credentials = {
      parameters.source = "${host}/kernel-params";
      # In the state directory; by hand where the file is run.
      "test.token".source = "./token";
    };
    firn.settings = {
      kernel = "${host}/kernel";
      initrd = [ "${host}/initrd" ];
      cmdline_file = "${host}/kernel-params";
    };
  };
}).spec
