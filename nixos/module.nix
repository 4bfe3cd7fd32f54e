{
  config,
  lib,
  pkgs,
  utils,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.udplb;

  yaml = pkgs.formats.yaml { };
  # The words that are typed here, and any other that the program knows: `udplb check` checks those.
  words =
    options:
    types.submodule {
      freeformType = yaml.type;
      inherit options;
    };
  # Unset words stay out of the file, so that `defaults` and the program's own defaults hold.
  word =
    type: example: description:
    mkOption {
      type = types.nullOr type;
      default = null;
      inherit example description;
    };

  octet = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])";
  ipv4Pattern = "${octet}(\\.${octet}){3}";
  ipv6Pattern = "[[:xdigit:]]*:[[:xdigit:]:.]*";
  linkLocalPattern = "[fF][eE][89abAB][[:xdigit:]:]*%[^[:space:]/:]{1,15}";
  ipv4 = types.strMatching ipv4Pattern // {
    description = "IPv4 address";
  };
  # What is no address but looks like one, `udplb check` finds.
  ipv6 = types.strMatching ipv6Pattern // {
    description = "IPv6 address";
  };
  any = types.enum [ "any" ];
  keyAddress =
    types.oneOf [
      ipv4
      ipv6
      any
    ]
    // {
      description = "IP address or \"any\"";
    };
  # A name ends in a label that is no number: a mistyped address is not taken for a name.
  host =
    types.oneOf [
      ipv4
      ipv6
      (types.strMatching linkLocalPattern)
      (types.strMatching "([[:alnum:]_-]+\\.)*[[:alnum:]-]*[[:alpha:]-][[:alnum:]-]*\\.?")
    ]
    // {
      description = "IP address or host name";
    };
  isName =
    address:
    !lib.any (pattern: builtins.match pattern address != null) [
      ipv4Pattern
      ipv6Pattern
      linkLocalPattern
      "local"
    ];
  network = types.strMatching "[[:xdigit:].:]+(/[0-9]{1,3})?" // {
    description = "network, like 10.20.0.0/16";
  };
  port = types.ints.between 1 65535;
  ports = types.either port (
    types.strMatching "[1-9][0-9]{0,4}-[1-9][0-9]{0,4}"
    // {
      description = ''port range "first-last"'';
    }
  );
  # Which address and port it is, `udplb check` finds.
  source =
    types.either (types.enum [
      "vip"
      "preserve"
      "egress"
    ]) (types.strMatching "[[:xdigit:].:]*[.:][[:xdigit:].:]*|\\[[[:xdigit:].:]+]:[0-9]{1,5}")
    // {
      description = "one of \"vip\", \"preserve\", \"egress\", an IP address, or ADDRESS:PORT";
    };
  way = types.enum [
    "link"
    "ipip"
    "gue"
  ];
  admission = types.enum [
    "deny"
    "allow"
  ];
  interface = types.strMatching "[^[:space:]/:]{1,127}" // {
    description = "network interface name (1 to 15 characters, an alternative name up to 127)";
  };

  xdpInterface = words {
    name = mkOption {
      type = interface;
      example = "ens3";
      description = "Name of the interface.";
    };
    xdp = word (types.enum [
      "off"
      "native"
      "generic"
    ]) "native" "Sends packets of `block` rules on before the kernel has made them an skb.";
  };

  duration = types.strMatching "[0-9]+(ms|s|m|h)" // {
    description = "duration, like 500ms, 10s or 2m";
  };
  announce = words {
    interface = mkOption {
      type = interface;
      example = "anycast0";
      description = "Interface that has an address while this host serves it well; a dummy that nothing else uses.";
    };
    last_resort =
      word interface "anycast1"
        "Interface that has an address while this host is sick, announced as worse. Without it a sick host withdraws the address.";
    hold_down =
      word duration "30s"
        "Time after which a host that was sick counts as well again. The program's default is 10s.";
    settle =
      word duration "5s"
        "Time that a stop waits between withdrawing the addresses and removing the filter. The program's default is 2s.";
    expire =
      word types.bool true
        "Whether the addresses disappear when `udplb arpd` has died. The program's default is no: packets are forwarded without it.";
  };

  flows = words {
    entries =
      word (types.ints.between 1024 4194288) 262144
        "Number of flows of each family. The program's default is 65536.";
    ports =
      word types.str "1024-65535"
        "Ports of this host that flows get. The program's default is 1024-32767.";
    addresses =
      word (types.listOf types.str) [ "10.2.0.254" ]
        "Addresses of this host that new flows are spread over, each with all of the ports. The program's default is its address towards the upstream.";
    unanswered =
      word duration "10s"
        "Lifetime of a flow whose client has not spoken again after an answer. The program's default is 30s.";
    assured = word duration "1h" "Lifetime of other flows. The program's default is 2m.";
  };

  decap = words {
    from = mkOption {
      type = types.either network (types.listOf network);
      example = [ "10.2.0.0/24" ];
      description = "Networks of the balancers, by the source address of outer headers.";
    };
    via = mkOption {
      type = types.listOf (
        types.enum [
          "ipip"
          "gue"
        ]
      );
      example = [
        "ipip"
        "gue"
      ];
      description = "Outer headers that are taken off: those of an IP header, or of UDP to port 6080.";
    };
  };

  payloadBytes = words {
    offset = mkOption {
      type = types.ints.u16;
      example = 4;
      description = "Number of bytes of the payload before the key.";
    };
    length = mkOption {
      type = types.ints.between 1 64;
      example = 8;
      description = "Number of bytes of the key.";
    };
  };
  serverId = words {
    offset =
      word (types.ints.between 0 19) 1
        "Offset of the id in the connection id, in bytes. The program's default is 1.";
    length = mkOption {
      type = types.ints.between 1 8;
      example = 2;
      description = "Length of the id in bytes.";
    };
  };
  payloads = [
    "statsd"
    "sflow-agent"
    "netflow9-source"
    "ipfix-domain"
    "gtpu-teid"
    "dns-id"
    "radius-id"
  ];
  probePort = word port 8080 "Port of the service to probe. The program's default is the upstream's.";
  probe = words { port = probePort; };
  healthCheck = words {
    udp = word (words {
      send = mkOption {
        type = types.str;
        example = "ping";
        description = "The datagram: text, or hexadecimal digits after `0x`.";
      };
      expect =
        word types.str "0x81??"
          "What its answer begins with. The program's default is any answer.";
      port = probePort;
    }) { send = "ping"; } "A datagram and its answer.";
    tcp = word port 514 "A TCP connection to this port is accepted.";
    http = word (words {
      port = probePort;
      path = word types.str "/healthz" "Path of the request. The program's default is `/`.";
      status =
        word (types.ints.between 100 599) 204
          "Status of the answer. The program's default is 200 to 399.";
    }) { path = "/healthz"; } "An HTTP request over TCP, without TLS.";
    icmp = word (words { }) { } "An ICMP echo.";
    dns = word (words {
      name = word types.str "example.org" "Name that must have a record.";
      port = probePort;
    }) { name = "example.org"; } "A DNS query over UDP.";
    ntp = word probe { } "An NTP request.";
    snmp = word (words {
      community = word types.str "public" "Community of SNMPv2c. The program's default is `public`.";
      port = probePort;
    }) { port = 161; } "An SNMPv2c request of `sysUpTime`.";
    sip = word probe { } "A SIP `OPTIONS` over UDP.";
    radius = word (words {
      secret = mkOption {
        type = types.str;
        example = "testing123";
        description = "Secret shared with the RADIUS server; it becomes readable in the Nix store.";
      };
      port = probePort;
    }) { secret = "testing123"; } "A RADIUS `Status-Server`.";
    syslog = word probe { } "A TCP connection to the upstream's own port.";
    interval = word duration "5s" "Time between probes. The program's default is `2s`.";
    timeout = word duration "500ms" "Time that an answer may take. The program's default is `1s`.";
    rise =
      word (types.ints.between 1 100) 3
        "Answers in a row to be up again. The program's default is 2.";
    fall =
      word (types.ints.between 1 100) 2
        "Failures in a row to be down. The program's default is 3.";
  };
  ruleOptions = words {
    tc_action =
      word
        (types.enum [
          "pass"
          "block"
        ])
        "block"
        "`pass` delivers the packet here too, `block` ends it here. The program's default is `pass`.";
    mode = word (types.enum
      [
        "balance"
        "replicate"
      ]
    ) "replicate" "One upstream for each packet (`balance`, the default) or all of them (`replicate`).";
    strategy =
      word
        (types.either
          (types.enum [
            "src-port"
            "src-ip"
            "src-ip-port"
            "dst-port"
            "random"
            "payload"
            "quic-cid"
          ])
          (
            types.listOf (
              types.enum [
                "src-ip"
                "src-port"
                "dst-port"
                "payload"
              ]
            )
          )
        )
        "src-ip"
        "Part of a packet that selects its upstream, or a list of parts that select together. The program's default is `src-ip-port`.";
    payload =
      word (types.either (types.enum payloads) payloadBytes)
        {
          offset = 4;
          length = 8;
        }
        "Key of the strategy `payload`, or of a list with it: bytes of the payload, a field of a known protocol, or the name of a StatsD metric (`statsd`).";
    server-id = word serverId {
      offset = 1;
      length = 2;
    } "Place of the server's id in the connection ids of QUIC, with `strategy = \"quic-cid\"`.";
    hash = word (types.enum [
      "modulo"
      "maglev"
    ]) "modulo" "Mapping from the strategy's key to an upstream. The program's default is `maglev`.";
    templates =
      word
        (types.enum [
          "one"
          "all"
        ])
        "all"
        "With `all`, NetFlow 9 and IPFIX datagrams with templates go to all upstreams. The program's default is `one`.";
    source =
      word source "preserve"
        "Sender that upstreams see: the matched destination (`vip`, the default), the original one (`preserve`), this host's own address (`egress`), or this address, with a port if it is to be another one than the sender's.";
    reply =
      word
        (types.enum [
          "none"
          "direct"
          "route"
          "nat"
        ])
        "route"
        "Way of the upstreams' answers: from the upstreams to the clients (`direct`), or back through this host (`route`, `nat`).";
    via = word way "gue" "Way to the upstreams with `reply: direct`.";
    answers =
      word types.ints.positive 1
        "Number of answers that ends a flow of `reply = \"nat\"`. Without it a flow ends when it has expired.";
    sticky =
      word types.bool true
        "Senders keep their upstream when the list of upstreams changes, by a flow each. The program's default is `false`.";
    health =
      word
        (types.either (types.enum [
          "off"
          "neighbour"
          "icmp"
          "dns"
          "ntp"
          "snmp"
          "sip"
          "syslog"
        ]) healthCheck)
        "dns"
        "Check by the next-hop service that an upstream must pass to be selected; the default is `off`.";
    all-down =
      word
        (types.enum [
          "open"
          "drop"
        ])
        "drop"
        "While all upstreams are down, packets go to them as if all were up (`open`, the default).";
    fragments =
      word
        (types.enum [
          "follow"
          "pass"
          "drop"
        ])
        "drop"
        "Fragments go where their first one goes (`follow`, the default), are only delivered here (`pass`), or are dropped (`drop`).";
    zero-checksum =
      word admission "allow"
        "Whether UDP over IPv6 without a checksum is sent on. The program's default is `deny`.";
    martians =
      word admission "allow"
        "Whether packets are sent on whose source address no router forwards. The program's default is `deny`.";
    senders =
      word (types.ints.between 16 262144) 4096
        "Number of senders that have room in a table of the rule, for `udplb senders` and metrics. Without it they are not counted.";
  };

  # Of upstreams and mirrors.
  hostOptions = {
    name = word types.str "nfcapd" "Name of the host, unique in its rule.";
    address = mkOption {
      type = host;
      example = "10.0.9.11";
      description = "Address or host name, or `local` for a receiver on this host.";
    };
    port = word port 9995 "UDP port. The program's default is the port that the packet came to.";
    addresses =
      word
        (types.enum [
          "one"
          "all"
        ])
        "all"
        "Whether one address of a host name is used, or each is an upstream. The program's default is `one`.";
    state = word (types.enum [
      "active"
      "drained"
    ]) "drained" "Others get the packets of a `drained` upstream. The program's default is `active`.";
    source = word source "egress" "Sender that this host sees, if not the rule's `source`.";
    sample =
      word (types.ints.between 1 1000000) 10
        "N: every N-th packet is sent. The program's default is 1.";
    from = word (types.either network (types.nonEmptyListOf network)) [
      "10.20.0.0/16"
    ] "Networks of senders; it gets only their packets. For mirrors and with `mode: replicate`.";
    not-from = word (types.either network (types.nonEmptyListOf network)) [
      "10.20.1.0/24"
    ] "Networks of senders whose packets it does not get.";
  };

  upstream = words (
    hostOptions
    // {
      via = word way "link" "Way to this upstream, if not the rule's `via`.";
      weight = word (types.ints.between 1 10000) 2 "Share of the flows. The program's default is 1.";
      server-id =
        word (types.strMatching "([0-9a-fA-F]{2}){1,8}") "0a01"
          "Id that this upstream puts into its connection ids, with `strategy = \"quic-cid\"`.";
      priority =
        word (types.ints.between 1 255) 2
          "Upstreams of a higher number get packets while all of the lower ones are drained or down. The program's default is 1.";
    }
  );
  mirror = words hostOptions;

  key = words {
    address = mkOption {
      type = keyAddress;
      example = "10.0.0.5";
      description = "Destination address that the rule matches; `any` is each address of the interfaces.";
    };
    port = mkOption {
      type = types.oneOf [
        ports
        (types.nonEmptyListOf ports)
        any
      ];
      example = [
        2055
        "6343-6350"
      ];
      description = "Destination ports that the rule matches: one, a range, a list of both, or `any`.";
    };
    from = word (types.either network (types.nonEmptyListOf network)) [
      "10.20.0.0/16"
    ] "Networks of senders that the rule matches. The program's default is any sender.";
    not-from = word (types.either network (types.nonEmptyListOf network)) [
      "10.20.1.0/24"
    ] "Networks of senders that the rule does not match.";
  };

  rule = words {
    name = word types.str "flows" "Name of the rule, unique. The program's default is address:port.";
    key = mkOption {
      type = key;
      example = {
        address = "10.0.0.5";
        port = 514;
      };
      description = "Packets that the rule matches.";
    };
    options = mkOption {
      type = ruleOptions;
      default = { };
      example = {
        mode = "replicate";
        source = "preserve";
      };
      description = "Treatment of the rule's packets; what is unset comes from {option}`services.udplb.defaults`.";
    };
    upstream = mkOption {
      type = types.nonEmptyListOf upstream;
      example = [ { address = "10.0.9.11"; } ];
      description = "Hosts that the rule's packets are sent to.";
    };
    mirror = word (types.nonEmptyListOf mirror) [
      {
        address = "10.0.9.13";
        sample = 10;
      }
    ] "Hosts that get copies besides.";
  };

  inherit (cfg) configFile rules;
  fromFile = configFile != null;

  interfaceNames = map (i: if lib.isString i then i else i.name) cfg.interfaces;

  withoutNull =
    v:
    if builtins.isAttrs v then
      lib.mapAttrs (_: withoutNull) (lib.filterAttrs (_: x: x != null) v)
    else if builtins.isList v then
      map withoutNull v
    else
      v;

  written =
    if fromFile then
      "${configFile}"
    else
      # JSON is YAML, and is read faster.
      pkgs.writeText "udplb.yaml" (
        builtins.toJSON (
          {
            version = 1;
            interfaces = withoutNull cfg.interfaces;
            defaults = withoutNull cfg.defaults;
            rules = withoutNull rules;
          }
          // lib.optionalAttrs (cfg.announce != null) { announce = withoutNull cfg.announce; }
          // lib.optionalAttrs (cfg.flows != null) { flows = withoutNull cfg.flows; }
          // lib.optionalAttrs (cfg.decap != null) { decap = withoutNull cfg.decap; }
        )
      );
  # A file outside the store changes without a rebuild: nothing can be said about it here.
  inStore = !fromFile || lib.hasPrefix builtins.storeDir written;
  # What ProtectHome and PrivateTmp hide.
  hidden = [
    "/home/"
    "/root/"
    "/run/user/"
    "/tmp/"
    "/var/tmp/"
  ];
  # A name server may be needed; what the rules of a file outside this configuration need is not known.
  needsNetwork =
    fromFile
    || lib.any (
      r: lib.any (u: isName u.address) (r.upstream ++ lib.optionals (r.mirror != null) r.mirror)
    ) rules;
  network-online = lib.optional needsNetwork "network-online.target";
  # The program knows the format by the extension.
  fileName = if lib.hasSuffix ".toml" written then "udplb.toml" else "udplb.yaml";
  file =
    if inStore && cfg.checkConfig then
      pkgs.runCommand fileName
        {
          source = written;
          nativeBuildInputs = [ cfg.package ];
        }
        ''
          udplb check --no-resolve "$source"
          ln -s "$source" "$out"
        ''
    else
      written;

  # A service that is probed by UDP is judged by ICMP errors for relayed packets too.
  hearsErrors =
    let
      checks = [
        "dns"
        "ntp"
        "radius"
        "sip"
        "snmp"
        "udp"
      ];
      isUdp =
        health:
        if builtins.isAttrs health then
          lib.any (check: lib.hasAttr check (withoutNull health)) checks
        else
          lib.elem health checks;
    in
    lib.any (options: isUdp options.health) ([ cfg.defaults ] ++ map (r: r.options) rules);

  command = args: utils.escapeSystemdExecArgs ([ (lib.getExe cfg.package) ] ++ args);
  # One late interface or unknown name must not keep the other rules out of the kernel.
  apply =
    flags:
    command (
      [
        "apply"
        "--partial"
      ]
      ++ flags
      ++ lib.optionals fromFile (
        lib.concatMap (i: [
          "-i"
          i
        ]) interfaceNames
      )
      ++ [ "${file}" ]
    );

  portList = r: lib.toList r.key.port;
  # Of the others it depends on networks and families whether two are one: `udplb check` knows.
  isPlain =
    r:
    r.key.address != "any"
    &&
      lib.attrNames (withoutNull r.key) == [
        "address"
        "port"
      ];
  keys = lib.concatLists (
    lib.imap0 (
      n: r:
      map (p: {
        rule = n;
        key = "${r.key.address}:${toString p}";
      }) (lib.optionals (isPlain r) (portList r))
    ) rules
  );
  doubled = lib.filterAttrs (_: uses: lib.length uses > 1) (lib.groupBy (k: k.key) keys);

  action =
    r:
    lib.findFirst (a: a != null) "pass" [
      r.options.tc_action
      cfg.defaults.tc_action
    ];
  opened = lib.concatMap portList (lib.filter (r: action r == "pass") rules);
  range =
    p:
    let
      ends = lib.splitString "-" (if p == "any" then "1-65535" else p);
    in
    {
      from = lib.toInt (lib.head ends);
      to = lib.toInt (lib.last ends);
    };

  metricsHost =
    if lib.hasInfix ":" cfg.metrics.address then "[${cfg.metrics.address}]" else cfg.metrics.address;

  hardening = import ./hardening.nix // {
    CapabilityBoundingSet = [
      "CAP_BPF"
      "CAP_NET_ADMIN"
      "CAP_PERFMON"
    ];
    # Before Linux 5.11 BPF maps count as locked memory.
    LimitMEMLOCK = "infinity";
    # ProtectKernelTunables would make /sys/fs/bpf read-only whatever ReadWritePaths says.
    ReadOnlyPaths = [
      "/proc/sys"
      "/sys"
    ];
    ReadWritePaths = [ "/sys/fs/bpf" ];
    RemoveIPC = true;
    # INET and UNIX: host names are asked of a name server or of a local daemon.
    RestrictAddressFamilies = [
      "AF_INET"
      "AF_INET6"
      "AF_NETLINK"
      "AF_UNIX"
    ];
    # A refused call is to end in a message, not in SIGSYS.
    SystemCallErrorNumber = "EPERM";
    SystemCallFilter = [
      "@system-service"
      "bpf"
    ];
  };
in
{
  imports = [ ./anycast.nix ];

  options.services.udplb = {
    enable = lib.mkEnableOption "udplb, which relays, forwards and balances UDP in the kernel";

    package =
      lib.mkPackageOption
        {
          udplb = pkgs.udplb or (pkgs.callPackage ./package.nix { });
        }
        "udplb"
        {
          example = "inputs.udplb.packages.x86_64-linux.default";
        };

    interfaces = mkOption {
      type = types.listOf (types.either interface xdpInterface);
      default = [ ];
      example = [ "ens3" ];
      description = ''
        Interfaces whose incoming packets the rules see, each a name, or `{ name = …; xdp = …; }`. May be
        empty where {option}`services.udplb.configFile` names its own, and replaces those if not.
      '';
    };

    rules = mkOption {
      type = types.listOf rule;
      default = [ ];
      example = lib.literalExpression ''
        [
          {
            name = "flows";
            key = { address = "10.0.0.5"; port = [ 2055 "6343-6350" ]; };
            options.source = "preserve";
            upstream = [ { address = "10.0.9.11"; } ];
          }
        ]
      '';
      description = "The rules, in the words of udplb's own configuration file.";
    };

    defaults = mkOption {
      type = ruleOptions;
      default = { };
      example = {
        source = "preserve";
      };
      description = "What rules say in `options` where they do not say it themselves.";
    };

    flows = mkOption {
      type = types.nullOr flows;
      default = null;
      example = {
        entries = 262144;
      };
      description = "Table of the flows of rules with `reply = \"nat\"`.";
    };

    decap = mkOption {
      type = types.nullOr decap;
      default = null;
      example = {
        from = [ "10.2.0.0/24" ];
        via = [ "gue" ];
      };
      description = ''
        Outer headers that are taken off packets to this host, an upstream of rules with
        `reply = "direct"` on balancers. The firewall must let the packets in them pass.
      '';
    };

    announce = mkOption {
      type = types.nullOr announce;
      default = null;
      example = {
        interface = "anycast0";
        last_resort = "anycast1";
      };
      description = ''
        Interfaces on which `udplb arpd` keeps the addresses of the keys while this host can serve
        them, for a routing daemon to announce.
      '';
    };

    configFile = mkOption {
      type = types.nullOr types.path;
      default = null;
      example = lib.literalExpression "./udplb.yaml";
      description = ''
        A configuration file (YAML or TOML) in place of {option}`services.udplb.rules`.
        A path goes into the store and is checked; a string outside the store is read where it is,
        and `systemctl reload udplb` applies it after a change. The service does not see
        home directories and `/tmp`.
      '';
    };

    checkConfig = mkOption {
      type = types.bool;
      default = pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform;
      defaultText = lib.literalMD "whether the build machine can run the program";
      example = false;
      description = ''
        Whether `udplb check` reads the configuration while the system is built, so that a bad rule
        fails the build and not the router.
      '';
    };

    keepOnStop = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = ''
        Whether the rules stay in the kernel when the service stops. They outlive `enable = false`
        too: `udplb detach` or a reboot removes them.
      '';
    };

    confirm = mkOption {
      type = types.nullOr types.ints.positive;
      default = null;
      example = 60;
      description = ''
        Seconds within which `udplb confirm` must follow a reload that changes the rules, as after
        `nixos-rebuild switch`. Without it the change is rolled back, and held until the rules change
        again. A start of the service, as at boot, needs no confirmation.
      '';
    };

    repairInterval = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "5min";
      description = ''
        How often the configuration is applied again, as a systemd time span: puts back what
        somebody else removed and resolves host names again. Costs nothing where nothing changed.
      '';
    };

    arpd.enable = mkOption {
      type = types.bool;
      default = true;
      example = false;
      description = ''
        Whether `udplb arpd` keeps the upstreams' next hops resolved and fresh, and completes what
        was missing when the rules were applied: interfaces and host names.
      '';
    };

    metrics = {
      enable = mkOption {
        type = types.bool;
        default = false;
        example = true;
        description = ''
          Whether `udplb arpd` answers Prometheus, at `/metrics`. Anybody who reaches the address may ask;
          the firewall is left as it is.
        '';
      };
      address = mkOption {
        type = types.str;
        default = "127.0.0.1";
        example = "::";
        description = "IP address to listen at.";
      };
      port = mkOption {
        type = types.port;
        default = 9477;
        example = 9500;
        description = "TCP port to listen at.";
      };
      hosts = mkOption {
        type = types.listOf types.str;
        default = [ ];
        example = [ "relay.example.net" ];
        description = ''
          Names that requests may use in their URL, besides addresses, `localhost` and this host's name.
          `*` stands for any name.
        '';
      };
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = ''
        Whether the firewall lets in the keys of `pass` rules on the named interfaces. Packets sent to
        upstreams never meet the firewall, the copy that is delivered here does.
      '';
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = cfg.interfaces != [ ] || fromFile;
        message = "services.udplb.interfaces: at least one interface is needed.";
      }
      {
        assertion = rules == [ ] || !fromFile;
        message = "services.udplb.rules: cannot be used together with services.udplb.configFile.";
      }
      {
        assertion = withoutNull cfg.defaults == { } || !fromFile;
        message = "services.udplb.defaults: cannot be used together with services.udplb.configFile.";
      }
      {
        assertion = cfg.flows == null || !fromFile;
        message = "services.udplb.flows: cannot be used together with services.udplb.configFile.";
      }
      {
        assertion = cfg.decap == null || !fromFile;
        message = "services.udplb.decap: cannot be used together with services.udplb.configFile.";
      }
      {
        assertion = cfg.announce == null || !fromFile;
        message = "services.udplb.announce: cannot be used together with services.udplb.configFile.";
      }
      {
        assertion = cfg.announce == null || cfg.arpd.enable;
        message = "services.udplb.announce: needs services.udplb.arpd.enable.";
      }
      {
        assertion = !(cfg.openFirewall && fromFile);
        message = "services.udplb.openFirewall: needs services.udplb.rules; the ports of a configFile are not known here.";
      }
      {
        assertion = !lib.any (folder: lib.hasPrefix folder written) hidden;
        message = "services.udplb.configFile: the service does not see ${written}: ProtectHome and PrivateTmp hide it. Put the file elsewhere, or give a path, which goes into the store.";
      }
      {
        assertion = cfg.metrics.enable -> cfg.arpd.enable;
        message = "services.udplb.metrics.enable: needs services.udplb.arpd.enable.";
      }
    ]
    ++ lib.mapAttrsToList (key: uses: {
      assertion = false;
      message = "services.udplb.rules.[${toString (lib.last uses).rule}].key: ${key} is the key of rules.[${toString (lib.head uses).rule}] already.";
    }) doubled;

    warnings = lib.optional (
      rules == [ ] && cfg.decap == null && !fromFile
    ) "services.udplb is enabled without rules.";

    environment.systemPackages = [ cfg.package ];
    environment.etc = lib.mkIf inStore { ${fileName}.source = file; };

    boot.kernelModules = [
      "cls_bpf"
      "sch_ingress"
    ];
    system.requiredKernelConfig = with config.lib.kernelConfig; [
      (isYes "BPF_SYSCALL")
      (isYes "DEBUG_INFO_BTF")
      (isYes "NET_CLS_ACT")
      (isEnabled "NET_CLS_BPF")
      (isEnabled "NET_SCH_INGRESS")
    ];

    networking.firewall.interfaces = lib.mkIf cfg.openFirewall (
      lib.genAttrs interfaceNames (_: {
        allowedUDPPorts = lib.filter lib.isInt opened;
        allowedUDPPortRanges = map range (lib.filter lib.isString opened);
      })
    );

    systemd.services.udplb = {
      description = "udplb rules";
      documentation = [ "man:udplb(1)" ];
      wantedBy = [ "multi-user.target" ];
      wants = network-online;
      # Only "after" the devices: wanting one that is late would hold back all the others.
      after = [
        "network.target"
      ]
      ++ network-online
      ++ map (i: "${utils.escapeSystemdPath "/sys/subsystem/net/devices/${i}"}.device") interfaceNames;
      unitConfig = {
        RequiresMountsFor = [ "/sys/fs/bpf" ];
        StartLimitIntervalSec = 0;
      };
      # The file's store path is in the unit: a changed rule is a changed unit is a reload.
      reloadIfChanged = true;
      serviceConfig =
        hardening
        // {
          Type = "oneshot";
          RemainAfterExit = true;
          ExecStart = apply [ ];
          ExecReload = apply (
            lib.optionals (cfg.confirm != null) [
              "--confirm"
              (toString cfg.confirm)
            ]
          );
          # 4: an interface or a name is missing. The rest serves, and arpd completes it: the unit
          # is active, so that a stop runs ExecStop.
          SuccessExitStatus = 4;
          Restart = "on-failure";
          RestartSec = 5;
          # Usage, configuration, no such file, privileges: trying again changes nothing.
          RestartPreventExitStatus = [
            64
            65
            66
            77
          ];
          TimeoutStartSec = 120;
        }
        // lib.optionalAttrs (!cfg.keepOnStop) { ExecStop = command [ "detach" ]; };
    };

    systemd.services.udplb-repair = lib.mkIf (cfg.repairInterval != null) {
      description = "udplb rules, applied again";
      documentation = [ "man:udplb(1)" ];
      # A stop ends a repair before it detaches: what the repair applied later would stay.
      partOf = [ "udplb.service" ];
      after = [ "udplb.service" ];
      unitConfig.StartLimitIntervalSec = 0;
      serviceConfig = hardening // {
        Type = "oneshot";
        ExecStart = apply [ "-q" ];
        SuccessExitStatus = "4 SIGTERM";
        TimeoutStartSec = 120;
      };
    };
    systemd.timers.udplb-repair = lib.mkIf (cfg.repairInterval != null) {
      description = "udplb rules, applied again";
      # Comes and goes with the rules: they must not return after a stop.
      wantedBy = [
        "timers.target"
        "udplb.service"
      ];
      partOf = [ "udplb.service" ];
      # It comes as often as the rules do.
      unitConfig.StartLimitIntervalSec = 0;
      timerConfig = {
        OnActiveSec = cfg.repairInterval;
        OnUnitInactiveSec = cfg.repairInterval;
      };
    };

    systemd.services.udplb-arpd = lib.mkIf cfg.arpd.enable {
      description = "udplb next hops";
      documentation = [ "man:udplb(1)" ];
      wantedBy = [ "multi-user.target" ];
      # "wants": next hops are kept for whatever is attached, also while udplb.service tries again.
      wants = [ "udplb.service" ];
      after = [ "udplb.service" ];
      unitConfig = {
        RequiresMountsFor = [ "/sys/fs/bpf" ];
        StartLimitIntervalSec = 0;
      };
      serviceConfig = hardening // {
        CapabilityBoundingSet = hardening.CapabilityBoundingSet ++ lib.optional hearsErrors "CAP_NET_RAW";
        Type = "notify";
        ExecStart = command (
          [ "arpd" ]
          ++ lib.optionals cfg.metrics.enable [
            "--metrics"
            "${metricsHost}:${toString cfg.metrics.port}"
          ]
          ++ lib.optionals cfg.metrics.enable (
            lib.concatMap (host: [
              "--metrics-host"
              host
            ]) cfg.metrics.hosts
          )
        );
        ExecReload = "${pkgs.coreutils}/bin/kill -HUP $MAINPID";
        Restart = "on-failure";
        RestartSec = 2;
        WatchdogSec = 30;
      };
    };
  };
}
