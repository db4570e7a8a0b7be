# Two machines on one vlan.
{
  name = "ping";

  nodes = {
    machine1 = { };
    machine2 = { };
  };

  testScript = ''
    start_all()
    machine1.wait_for_unit("network.target")
    machine2.wait_for_unit("network.target")
    machine1.succeed("ping -c 1 machine2")
    machine2.succeed("ping -c 1 machine1")
  '';
}
