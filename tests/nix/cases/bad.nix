# Configurations that must be refused, each with a message that names the option.
#
# error: evaluation stops with it. failed: an assertion says it. check: `udplb check` says it, while
# the system is built.
lib:
let
  # `with` replaces parts of one good rule
  rules = list: {
    services.udplb = {
      enable = true;
      interfaces = [ "ens3" ];
      rules = map (
        with':
        {
          key = {
            address = "10.0.0.5";
            port = with'.port or 514;
          };
          upstream = [ { address = "10.0.9.1"; } ];
        }
        // removeAttrs with' [ "port" ]
      ) list;
    };
  };
  rule = with': rules [ with' ];
  key = key: rule { inherit key; };
  port = port: rule { inherit port; };
  options = options: rule { inherit options; };
  upstream = upstream: rule { upstream = [ upstream ]; };

  entry = "\"\\[definition 1-entry 1\\]\"";
  inRule = field: "services\\.udplb\\.rules\\.${entry}\\.${field}";
  wrong = field: type: { error = "${inRule field}. is not of type .${type}"; };
  # of the file, by the program
  unknown = field: { check = "rules\\[0\\]\\.${field}: .*unknown"; };
in
{
  address = {
    expect = wrong "key\\.address" "IP address or \"any\"";
    config = key {
      address = "10.0.0.500";
      port = 514;
    };
  };
  port-zero = {
    expect = wrong "key\\.port" "";
    config = port 0;
  };
  port-in-list = {
    expect = wrong "key\\.port\\.\"\\[definition 1-entry 2\\]\"" "";
    config = port [
      514
      65536
    ];
  };
  port-range = {
    expect = wrong "key\\.port" "";
    config = port "0-514";
  };
  port-none = {
    expect = wrong "key\\.port" "";
    config = port [ ];
  };
  key-word = {
    expect = unknown "key\\.prot";
    config = key {
      address = "10.0.0.5";
      port = 514;
      prot = 514;
    };
  };
  rule-word = {
    expect = unknown "upstreams";
    config = rule { upstreams = [ ]; };
  };
  rule-name = {
    expect = wrong "name" "null or string";
    config = rule { name = 1; };
  };
  option-word = {
    expect = unknown "options\\.action";
    config = options { action = "pass"; };
  };
  tc_action = {
    expect = wrong "options\\.tc_action" "null or one of .pass., .block.'";
    config = options { tc_action = "drop"; };
  };
  mode = {
    expect = wrong "options\\.mode" "null or one of .balance., .replicate.'";
    config = options { mode = "copy"; };
  };
  strategy = {
    expect = wrong "options\\.strategy" "null or one of .src-port., .src-ip., .src-ip-port., .dst-port., .random., .payload., .quic-cid. or list of .*one of .*'";
    config = options { strategy = "round-robin"; };
  };
  source = {
    expect = wrong "options\\.source" "null or one of .vip., .preserve., .egress., an IP address, or ADDRESS:PORT";
    config = options { source = "own"; };
  };
  hash = {
    expect = wrong "options\\.hash" "null or one of .modulo., .maglev.'";
    config = options { hash = "md5"; };
  };
  health = {
    expect = wrong "options\\.health" "";
    config = options { health = "ping"; };
  };
  health-pace = {
    expect = wrong "options\\.health\\.interval" "null or duration";
    config = options {
      health = {
        dns = { };
        interval = "5";
      };
    };
  };
  health-check = {
    expect.check = "a health check needs something to ask";
    config = options { health.interval = "5s"; };
  };
  fragments = {
    expect = wrong "options\\.fragments" "null or one of .follow., .pass., .drop.'";
    config = options { fragments = "reassemble"; };
  };
  zero-checksum = {
    expect = wrong "options\\.zero-checksum" "null or one of .deny., .allow.'";
    config = options { zero-checksum = true; };
  };
  payload-word = {
    expect = wrong "options\\.payload" "";
    config = options { payload = "stats"; };
  };
  payload-length = {
    expect = wrong "options\\.payload\\.length" "integer between 1 and 64";
    config = options {
      payload = {
        offset = 0;
        length = 65;
      };
    };
  };
  templates = {
    expect = wrong "options\\.templates" "null or one of .one., .all.'";
    config = options { templates = "two"; };
  };
  strategy-list = {
    expect.check = "a list needs two parts at least";
    config = options { strategy = [ "src-ip" ]; };
  };
  payload-without-strategy = {
    expect.check = "`payload` needs `strategy: payload`";
    config = options { payload = "statsd"; };
  };
  from = {
    expect = wrong "key\\.from" "null or network";
    config = key {
      address = "10.0.0.5";
      port = 514;
      from = "10.20.0.0/";
    };
  };
  from-bits = {
    expect.check = "rules\\[0\\]\\.key\\.from.*has bits beyond the prefix";
    config = key {
      address = "10.0.0.5";
      port = 514;
      from = [ "10.20.0.1/16" ];
    };
  };
  families = {
    expect.check = "10\\.0\\.9\\.1 is IPv4, and 2001:db8::5 is IPv6";
    config = key {
      address = "2001:db8::5";
      port = 514;
    };
  };
  ipv6 = {
    expect.check = "rules\\[0\\]\\.key\\.address";
    config = key {
      address = "2001:db8::5::6";
      port = 514;
    };
  };
  mirror-word = {
    expect = unknown "mirror\\[0\\]\\.weight";
    config = rule {
      mirror = [
        {
          address = "10.0.9.2";
          weight = 2;
        }
      ];
    };
  };
  upstream-weight = {
    expect = wrong "upstream\\.${entry}\\.weight" "null or integer between 1 and 10000";
    config = upstream {
      address = "10.0.9.1";
      weight = 0;
    };
  };
  upstream-state = {
    expect = wrong "upstream\\.${entry}\\.state" "null or one of .active., .drained.'";
    config = upstream {
      address = "10.0.9.1";
      state = "down";
    };
  };
  upstream-sample = {
    expect.check = "`sample` needs `mode: replicate`";
    config = upstream {
      address = "10.0.9.1";
      sample = 2;
    };
  };
  upstream-none = {
    expect = wrong "upstream" "non-empty";
    config = rule { upstream = [ ]; };
  };
  upstream-word = {
    expect = unknown "upstream\\[0\\]\\.adress";
    config = upstream {
      address = "10.0.9.1";
      adress = "10.0.9.2";
    };
  };
  upstream-address = {
    expect = wrong "upstream\\.${entry}\\.address" "IP address or host name";
    config = upstream { address = "10.0.9.300"; };
  };
  upstream-port = {
    expect = wrong "upstream\\.${entry}\\.port" "null or integer between 1 and 65535";
    config = upstream {
      address = "10.0.9.1";
      port = 0;
    };
  };
  defaults = {
    expect.error = "services\\.udplb\\.defaults\\.source. is not of type";
    config = lib.recursiveUpdate (rules [ ]) { services.udplb.defaults.source = "own"; };
  };
  rules-no-list = {
    expect.error = "services\\.udplb\\.rules. is not of type .list of";
    config = lib.recursiveUpdate (rules [ ]) { services.udplb.rules = "10.0.0.5:514"; };
  };
  option-unknown = {
    expect.error = "The option .services\\.udplb\\.rulez. does not exist";
    config.services.udplb.rulez = [ ];
  };
  interface-name = {
    expect.error = "services\\.udplb\\.interfaces\\.${entry}. is not of type .network interface name";
    config = lib.recursiveUpdate (rules [ ]) {
      services.udplb.interfaces = [ "eth0:1" ];
    };
  };
  confirm = {
    expect.error = "services\\.udplb\\.confirm. is not of type .null or \\(?positive integer";
    config = lib.recursiveUpdate (rules [ ]) { services.udplb.confirm = 0; };
  };
  interfaces-none = {
    expect.failed = "^services\\.udplb\\.interfaces: at least one";
    config.services.udplb.enable = true;
  };
  rules-and-file = {
    expect.failed = "^services\\.udplb\\.rules: .*configFile";
    config.imports = [
      (rule { })
      { services.udplb.configFile = "/etc/udplb.yaml"; }
    ];
  };
  defaults-and-file = {
    expect.failed = "^services\\.udplb\\.defaults: .*configFile";
    config.services.udplb = {
      enable = true;
      configFile = "/etc/udplb.yaml";
      defaults.source = "vip";
    };
  };
  firewall-and-file = {
    expect.failed = "^services\\.udplb\\.openFirewall: needs services\\.udplb\\.rules";
    config.services.udplb = {
      enable = true;
      configFile = "/etc/udplb.yaml";
      openFirewall = true;
    };
  };
  file-at-home = {
    expect.failed = "^services\\.udplb\\.configFile: the service does not see /home/ops/udplb\\.yaml";
    config.services.udplb = {
      enable = true;
      configFile = "/home/ops/udplb.yaml";
    };
  };
  file-in-tmp = {
    expect.failed = "^services\\.udplb\\.configFile: the service does not see /tmp/udplb\\.yaml";
    config.services.udplb = {
      enable = true;
      configFile = "/tmp/udplb.yaml";
    };
  };
  metrics-without-arpd = {
    expect.failed = "^services\\.udplb\\.metrics\\.enable: needs services\\.udplb\\.arpd";
    config.services.udplb = {
      enable = true;
      interfaces = [ "ens3" ];
      arpd.enable = false;
      metrics.enable = true;
    };
  };
  key-twice = {
    expect.failed = "^services\\.udplb\\.rules\\.\\[1\\]\\.key: 10\\.0\\.0\\.5:514 is the key of rules\\.\\[0\\]";
    config = rules [
      { }
      {
        port = [
          2055
          514
        ];
      }
    ];
  };
  key-overlaps = {
    expect.check = "rules\\[1\\]";
    config = rules [
      { }
      { port = "500-600"; }
    ];
  };
  upstream-is-key = {
    expect.check = "rules\\[0\\]\\.upstream";
    config = upstream { address = "10.0.0.5"; };
  };
}
