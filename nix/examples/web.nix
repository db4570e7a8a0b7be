# One machine, and what it serves.
{
  name = "web";

  nodes.server = {
    services.nginx = {
      enable = true;
      virtualHosts.default.locations."/".return = "200 hello";
    };
  };

  testScript = ''
    server.wait_for_unit("nginx.service")
    server.wait_for_open_port(80)
    t.assertIn("hello", server.succeed("curl --fail http://localhost/"))
  '';
}
