# Configurations that evaluate, and what must come of them.
let
  interfaces = [
    "ens3"
    "br-lan"
  ];
  rules = [
    {
      name = "flows";
      key = {
        address = "10.0.0.5";
        port = [
          2055
          "6343-6350"
        ];
        from = [
          "10.20.0.0/16"
          "192.0.2.1"
        ];
      };
      options = {
        tc_action = "pass";
        mode = "balance";
        health = {
          udp = {
            send = "ping";
            expect = "0x70??";
            port = 5353;
          };
          interval = "5s";
        };
        all-down = "drop";
        hash = "maglev";
        templates = "all";
        strategy = [
          "src-ip"
          "payload"
        ];
        payload = {
          offset = 4;
          length = 8;
        };
        fragments = "pass";
        zero-checksum = "allow";
        martians = "deny";
        senders = 4096;
      };
      upstream = [
        {
          name = "nfcapd";
          address = "10.0.9.11";
          weight = 2;
          state = "drained";
        }
        {
          address = "elastic.example.net";
          port = 9995;
          source = "egress";
        }
      ];
      mirror = [
        {
          address = "10.0.9.13";
          sample = 10;
          source = "10.0.0.9:9995";
        }
      ];
    }
    {
      key = {
        address = "2001:db8::5";
        port = 514;
      };
      options = {
        tc_action = "block";
        mode = "replicate";
        source = "vip";
      };
      upstream = [
        { address = "fe80::1%br-lan"; }
        {
          address = "2001:db8::12";
          source = "[2001:db8::9]:514";
        }
        {
          address = "2001:db8::13";
          source = "2001:db8::9";
        }
      ];
    }
    {
      key = {
        address = "any";
        port = "any";
        from = "10.30.0.0/16";
      };
      options = {
        tc_action = "block";
        strategy = "payload";
        payload = "statsd";
      };
      upstream = [ { address = "10.0.9.12"; } ];
    }
  ];
in
{
  off = {
    expect.units = [ ];
    config = { };
  };

  # Every word of the module once.
  every-word = {
    expect = {
      kernelModules = [
        "cls_bpf"
        "sch_ingress"
      ];
      kernelConfig = [
        "CONFIG_BPF_SYSCALL isYes"
        "CONFIG_DEBUG_INFO_BTF isYes"
        "CONFIG_NET_CLS_ACT isYes"
        "CONFIG_NET_CLS_BPF isEnabled"
        "CONFIG_NET_SCH_INGRESS isEnabled"
      ];
      says."udplb-repair.timer" =
        "PartOf=udplb.service\n(?s:.*)OnActiveSec=5min\nOnUnitInactiveSec=5min\n(?s:.*)WantedBy=timers.target udplb.service";
      says."udplb-repair.service" =
        "PartOf=udplb.service\n(?s:.*)ExecStart=.*\"apply\" \"--partial\" \"-q\" \"/stub/";
      says."udplb.service" =
        "ExecReload=.*\"apply\" \"--partial\" \"--confirm\" \"60\" \"/stub/[^\n]*\nExecStart=.*\"--partial\" \"/stub/";
      units = [
        "udplb-arpd.service"
        "udplb-repair.service"
        "udplb-repair.timer"
        "udplb.service"
      ];
      open.ens3 = [
        2055
        {
          from = 6343;
          to = 6350;
        }
      ];
      file = {
        version = 1;
        inherit interfaces rules;
        defaults.source = "preserve";
      };
    };
    config.services.udplb = {
      enable = true;
      inherit interfaces rules;
      defaults.source = "preserve";
      confirm = 60;
      repairInterval = "5min";
      openFirewall = true;
    };
  };

  # A file outside the store that names its own interfaces: nothing to check, nothing to link in /etc.
  file = {
    expect = {
      units = [ "udplb.service" ];
      etc = [ ];
      says."udplb.service" = "ExecStart=.*\"apply\" \"--partial\" \"/var/lib/udplb.toml\"\n";
      silent."udplb.service" = "ExecStop=|\"-i\"";
    };
    config.services.udplb = {
      enable = true;
      configFile = "/var/lib/udplb.toml";
      arpd.enable = false;
      keepOnStop = true;
    };
  };

  # A file of the configuration is checked, and the interfaces replace the file's own.
  file-in-store = {
    expect = {
      etc = [ "udplb.yaml" ];
      says."udplb.service" = "ExecReload=.*\"-i\" \"br-lan\" \"/stub/[0-9a-f]*-udplb.yaml\"\n";
    };
    config.services.udplb = {
      enable = true;
      configFile = ../../../examples/seed.yaml;
      interfaces = [ "br-lan" ];
    };
  };

  # TOML is known by its extension.
  file-toml = {
    expect.etc = [ "udplb.toml" ];
    config.services.udplb = {
      enable = true;
      configFile = ../../../examples/udplb.toml;
    };
  };

  # What the rules do not say is said by the defaults, also to the firewall.
  firewall-by-default = {
    expect.open.ens3 = [ ];
    config.services.udplb = {
      enable = true;
      interfaces = [ "ens3" ];
      openFirewall = true;
      defaults.tc_action = "block";
      rules = [
        {
          key = {
            address = "10.0.0.5";
            port = 514;
          };
          upstream = [ { address = "10.0.9.12"; } ];
          mirror = [
            {
              address = "local";
              port = 1514;
            }
          ];
        }
      ];
    };
  };

  # Any port is all ports, to the firewall too; rules may share a key.
  firewall-any-port = {
    expect.open.ens3 = [
      514
      514
      {
        from = 1;
        to = 65535;
      }
    ];
    config.services.udplb = {
      enable = true;
      interfaces = [ "ens3" ];
      openFirewall = true;
      rules = [
        {
          name = "all";
          key = {
            address = "10.0.0.5";
            port = 514;
          };
          upstream = [ { address = "10.0.9.12"; } ];
        }
        {
          name = "some";
          key = {
            address = "10.0.0.5";
            port = 514;
            from = "10.20.0.0/16";
          };
          upstream = [ { address = "10.0.9.12"; } ];
        }
        {
          name = "else";
          key = {
            address = "10.0.0.5";
            port = "any";
          };
          upstream = [ { address = "10.0.9.12"; } ];
        }
      ];
    };
  };

  # What the units must say to start in order, to be reloaded and to be kept at it. No name is used:
  # nothing waits for the network.
  units = {
    expect = {
      says = {
        "udplb.service" =
          "(?s)After=network.target sys-subsystem-net-devices-br\\\\x2dlan.device\n.*X-ReloadIfChanged=true\n.*ExecReload=(?P<apply>[^\n]*)\nExecStart=(?P=apply)\nExecStop=[^\n]*\"detach\"\n.*Restart=on-failure\n.*RestartPreventExitStatus=64\nRestartPreventExitStatus=65\nRestartPreventExitStatus=66\nRestartPreventExitStatus=77\n.*SuccessExitStatus=4\n.*Type=oneshot\n";
        "udplb-arpd.service" =
          "(?s)Wants=udplb.service\nAfter=udplb.service\n.*Restart=on-failure\n.*Type=notify\n.*WatchdogSec=30\n";
      };
      silent."udplb.service" = "network-online";
      silent."udplb-arpd.service" = "Requires=|X-ReloadIfChanged";
    };
    config.services.udplb = {
      enable = true;
      interfaces = [ "br-lan" ];
      rules = [
        {
          key = {
            address = "10.0.0.5";
            port = 514;
          };
          upstream = [ { address = "10.0.9.12"; } ];
          mirror = [ { address = "10.0.9.13"; } ];
        }
        {
          key = {
            address = "2001:db8::5";
            port = 514;
          };
          upstream = [ { address = "fe80::1%br-lan"; } ];
        }
      ];
    };
  };

  # A name server may be far away.
  units-with-name = {
    expect.says."udplb.service" =
      "Wants=network-online.target\n(?s:.*)After=network.target network-online.target sys-subsystem";
    config.services.udplb = {
      enable = true;
      interfaces = [ "ens3" ];
      rules = [
        {
          key = {
            address = "10.0.0.5";
            port = 514;
          };
          upstream = [ { address = "10.0.9.12"; } ];
          mirror = [ { address = "collector"; } ];
        }
      ];
    };
  };

  # As Debian's units are: what a file says is not known.
  units-with-file = {
    expect = { };
    config.services.udplb = {
      enable = true;
      configFile = "/etc/udplb.yaml";
    };
  };

  # A new word of a key may tell apart what an address and a port do not.
  new-word-in-key = {
    expect = { };
    config.services.udplb = {
      enable = true;
      checkConfig = false;
      interfaces = [ "ens3" ];
      rules =
        map
          (colour: {
            key = {
              address = "10.0.0.5";
              port = 514;
              inherit colour;
            };
            upstream = [ { address = "10.0.9.12"; } ];
          })
          [
            "red"
            "blue"
          ];
    };
  };

  # A word that the module does not know is the program's matter; here there is none to ask.
  new-words = {
    expect.file = {
      version = 1;
      interfaces = [ "ens3" ];
      defaults.shape = "round";
      rules = [
        {
          key = {
            address = "10.0.0.5";
            port = 514;
            colour = [
              "red"
              { deep = true; }
            ];
          };
          options.payload = {
            offset = 1;
            length = 2;
            case = "upper";
          };
          upstream = [
            {
              address = "10.0.9.12";
              speed = 1.5;
            }
          ];
          mirror = [
            {
              address = "10.0.9.13";
              speed = 2;
            }
          ];
          until = "noon";
        }
      ];
    };
    config.services.udplb = {
      enable = true;
      checkConfig = false;
      interfaces = [ "ens3" ];
      defaults = {
        shape = "round";
        dropped = null;
      };
      rules = [
        {
          key = {
            address = "10.0.0.5";
            port = 514;
            colour = [
              "red"
              { deep = true; }
            ];
          };
          options.payload = {
            offset = 1;
            length = 2;
            case = "upper";
          };
          upstream = [
            {
              address = "10.0.9.12";
              speed = 1.5;
            }
          ];
          mirror = [
            {
              address = "10.0.9.13";
              speed = 2;
            }
          ];
          until = "noon";
        }
      ];
    };
  };

  metrics = {
    expect.says."udplb-arpd.service" = "ExecStart=.*\"arpd\" \"--metrics\" \"127.0.0.1:9477\"\n";
    config.services.udplb = {
      enable = true;
      interfaces = [ "ens3" ];
      metrics.enable = true;
    };
  };

  metrics-elsewhere = {
    expect.says."udplb-arpd.service" =
      "ExecStart=.*\"--metrics\" \"\\[::1\\]:9500\" \"--metrics-host\" \"relay.example.net\"\n";
    config.services.udplb = {
      enable = true;
      interfaces = [ "ens3" ];
      metrics = {
        enable = true;
        address = "::1";
        port = 9500;
        hosts = [ "relay.example.net" ];
      };
    };
  };

  anycast = {
    expect.says."udplb-anycast.service" = "ExecStart=.*/bin/ip link set anycast1 up\n";
    config.services.udplb = {
      enable = true;
      interfaces = [ "ens3" ];
      anycast.enable = true;
      rules = [
        {
          key = {
            address = "10.99.0.53";
            port = 53;
          };
          options = {
            tc_action = "block";
            reply = "nat";
            answers = 1;
          };
          upstream = [ { address = "10.2.0.11"; } ];
        }
        {
          key = {
            address = "10.99.0.53";
            port = 514;
          };
          options = {
            tc_action = "block";
            sticky = true;
            strategy = "quic-cid";
            server-id.length = 2;
          };
          upstream = [
            {
              address = "10.2.0.11";
              server-id = "0a01";
            }
          ];
        }
      ];
    };
  };

  # An upstream has no rules.
  decap = {
    expect.file = {
      version = 1;
      interfaces = [ "ens3" ];
      defaults = { };
      rules = [ ];
      decap = {
        from = [ "10.2.0.0/24" ];
        via = [ "gue" ];
      };
    };
    config.services.udplb = {
      enable = true;
      interfaces = [ "ens3" ];
      decap = {
        from = [ "10.2.0.0/24" ];
        via = [ "gue" ];
      };
    };
  };
}
