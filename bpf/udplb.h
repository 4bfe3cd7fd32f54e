/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The contract between the program and user space: every struct directly above the map
 * that holds it. Rust sees these definitions through the generated skeleton and nowhere else.
 *
 * Addresses and ports are in network byte order, everything else in host byte order. An address
 * of four words holds an IPv4 address in the first, with zeroes behind it.
 */
#ifndef UDPLB_H
#define UDPLB_H

#define SIZE_IS(type, size) _Static_assert(sizeof(type) == (size), #type " is part of the contract")

enum action {
	ACTION_PASS,  /* a copy goes to the upstream, the original up the stack */
	ACTION_BLOCK, /* the packet itself goes to the upstream */
};

enum strategy {
	STRATEGY_SRC_PORT,
	STRATEGY_SRC_IP,
	STRATEGY_SRC_IP_PORT,
	STRATEGY_RANDOM,
	STRATEGY_PAYLOAD, /* bytes at payload_offset */
	STRATEGY_STATSD,  /* the name of the metric */
};

enum source {
	SOURCE_VIP,	 /* the matched destination address */
	SOURCE_PRESERVE, /* the sender's own address */
	SOURCE_EGRESS,	 /* this host's address on the way to the upstream */
};

/* What becomes of datagrams that come in fragments. */
enum fragments {
	FRAGMENTS_FOLLOW, /* they go the way of the first one */
	FRAGMENTS_PASS,	  /* up the stack */
	FRAGMENTS_DROP,
};

/* Where a packet that matched a rule ended: exactly one of these is counted for it. */
enum verdict {
	VERDICT_FORWARDED,
	VERDICT_STALE_NEIGHBOUR, /* sent, to a MAC address that nobody vouches for any more */
	VERDICT_NO_ROUTE,
	VERDICT_NO_NEIGHBOUR,
	VERDICT_MTU,
	VERDICT_TTL,
	VERDICT_FRAGMENT, /* not sent, as `fragments` of the rule asks for */
	VERDICT_NO_UPSTREAM,
	VERDICT_CLONE_FAILED, /* no memory to change or copy the packet, or the copy was refused */
	VERDICT_MALFORMED,
	VERDICT_NOT_FOR_US,	/* untouched: the frame is for another host */
	VERDICT_FRAGMENT_EARLY, /* its first one has not been seen */
	VERDICT_FRAGMENT_FULL,	/* no room to remember where the later ones are to go */
	VERDICTS,
	/* counted at a rule besides the verdict */
	NOTE_SHORT_PAYLOAD = VERDICTS, /* selected by sender: it has no bytes where the strategy looks */
	NOTE_SEVERAL_METRICS,	       /* selected by the first */
	COUNTERS,
};

/* Generation: what the program is loaded for, so that it pays for nothing else. */
struct features {
	__u8 ipv6;
	__u8 any_port;
	__u8 senders;
	__u8 fragments; /* are not all left alone */
	__u8 payload;	/* selects */
	__u8 receivers; /* get copies of what others get too */
	__u8 errors;	/* go back to senders */
	/* What would become of a packet is to be said, and nothing is to be sent or counted. */
	__u8 asking;
	__u32 generation;
	__u32 ticks_per_second; /* of the clock that jiffies count */
};
SIZE_IS(struct features, 16);

const volatile struct features features = {
	.ipv6 = 1,
	.any_port = 1,
	.senders = 1,
	.fragments = 1,
	.payload = 1,
	.receivers = 1,
	.errors = 1,
	.ticks_per_second = 250,
};

/* Generation: the IPv4 key entries. A port range is an entry for each of its ports; 0 is any port. */
struct rule_key {
	__be32 address;
	__be16 port;
	__u16 unused;
};
SIZE_IS(struct rule_key, 8);

enum rule_flags {
	RULE_REPLICATES = 1 << 0, /* every receiver gets it, and no upstream is selected */
	RULE_SKIPS_DOWN = 1 << 1, /* an upstream that is down is not selected */
	RULE_HASHES = 1 << 2,	  /* what selects is hashed, not taken for a number */
	RULE_OF_GROUP = 1 << 3,	  /* the key is a multicast or broadcast address */
};

struct rule {
	__u32 id;      /* in `counters` */
	__u32 senders; /* in `senders`, where the sender decides which rule it is; 0: this one */
	enum rule_flags flags;
	enum action action;
	enum strategy strategy;
	enum fragments fragments;
	__u32 first_slot;
	__u32 slots;
	__u32 first_upstream; /* of those that slots stand for */
	__u32 first_receiver; /* of those that get a copy each */
	__u32 receivers;
	__u16 payload_offset;
	__u16 payload_length;
};
SIZE_IS(struct rule, 48);

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct rule_key);
	__type(value, struct rule);
} rules SEC(".maps");

/* Generation: the IPv6 key entries. */
struct rule_key6 {
	__be32 address[4];
	__be16 port;
	__u16 unused;
};
SIZE_IS(struct rule_key6, 20);

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct rule_key6);
	__type(value, struct rule);
} rules6 SEC(".maps");

/* Generation: of keys that several rules share, the rule by the sender; the longest prefix wins. */
struct sender_key {
	__u32 bits;	/* that count: 32 of the group, and the prefix */
	__be32 senders; /* of the key's entry; the trie wants the first byte first */
	__be32 address[4];
};
SIZE_IS(struct sender_key, 24);

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct sender_key);
	__type(value, struct rule);
} senders SEC(".maps");

/* Generation: the addresses of all keys, for packets that show no port. */
struct key_address {
	__be32 words[4];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct key_address);
	__type(value, __u32);
} addresses SEC(".maps");

/*
 * Generation: slot -> which of the rule's upstreams, packed because an array element takes 8
 * bytes at least. Rules whose tables are equal share one.
 */
#define SLOTS_PER_LINE 32

struct slot_line {
	__u16 upstream[SLOTS_PER_LINE];
};
SIZE_IS(struct slot_line, 64);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct slot_line);
} slots SEC(".maps");

/* Generation: the upstreams of all rules; those of one rule, and its receivers, are neighbours. */
#define MOST_RECEIVERS 64

struct upstream {
	__u32 id; /* in `counters`, `nexthops` and `overrides` */
	__be32 address[4];
	__be16 port;  /* 0: the port that the packet came to */
	__u8 drained; /* by the configuration */
	__u8 twin;    /* how many before it get copies of the same packet at the same address */
	enum source source;
	__u32 sample; /* of so many packets, a receiver gets one */
};
SIZE_IS(struct upstream, 32);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct upstream);
} upstreams SEC(".maps");

/* Generation: how many packets came past a receiver that gets samples. By upstream index. */
struct sampled {
	struct bpf_spin_lock lock;
	__u32 packets;
};
SIZE_IS(struct sampled, 8);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sampled);
} samples SEC(".maps");

/* Generation: its description in JSON, cut into chunks; not read by the program. */
#define CONFIG_CHUNK 4096

struct config_chunk {
	__u8 json[CONFIG_CHUNK];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct config_chunk);
} description SEC(".maps");

/*
 * State: what was counted under an id of a rule or an upstream; id 0 is for what belongs to
 * no rule. The outer array is fixed and its inner maps are made on demand, so that the table
 * grows while programs of two generations write it.
 */
#define COUNTERS_PER_CHUNK 1024
#define COUNTER_CHUNKS 512

struct counter {
	__u64 packets; /* a GSO packet is its segments, here and below */
	__u64 bytes;   /* with the Ethernet header, without VLAN tags and FCS */
};

struct counters {
	struct counter
		of[16]; /* by verdict and note; with room, so that a new one does not reset the others */
};
SIZE_IS(struct counters, 256);
_Static_assert(COUNTERS <= 16, "a verdict or a note has no counter");

struct counters_chunk {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS_PER_CHUNK);
	__type(key, __u32);
	__type(value, struct counters);
} counters_chunk SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, COUNTER_CHUNKS);
	__type(key, __u32);
	__array(values, struct counters_chunk);
} counters SEC(".maps");

/*
 * State: by upstream id, what user space knows of the way there. In chunks like the counters:
 * a hash lookup costs as much as matching the packet. An array element tears under the reader,
 * so there are two copies: the writer fills the one that is not in use, then moves on to it.
 */
#define NEXTHOPS_PER_CHUNK 1024

enum macs {
	MACS_UNKNOWN,
	MACS_KNOWN, /* but the neighbour does not answer any more */
	MACS_FRESH, /* as good as the kernel's own neighbour table while the lease holds */
	MACS_NONE,  /* the interface has no Ethernet header: none are needed */
};

enum health {
	HEALTH_UNKNOWN,
	HEALTH_UP,
	HEALTH_STALE, /* a probe is not answered yet */
	HEALTH_DOWN,
};

struct nexthop {
	__be32 address[4]; /* the upstream's; the entry is for nobody else, whatever its id says */
	__be32 gateway[4]; /* the neighbour to ask for: the upstream itself where it is on the link */
	__be32 egress[4];  /* this host's own address on the way; zeroes: unknown */
	__u8 destination[6];
	__u8 source[6];
	__u32 ifindex; /* 0: no route */
	__u16 family;  /* of the gateway */
	__u16 mtu;     /* of the route; 0: unknown */
	enum macs macs;
	enum health health;
	__u32 since; /* when the health became what it is, in seconds since 1970 */
};
SIZE_IS(struct nexthop, 80);

struct nexthop_slot {
	__u32 sequence; /* the last bit says which copy is in use */
	__u32 unused;
	struct nexthop copies[2];
};
SIZE_IS(struct nexthop_slot, 168);

struct nexthops_chunk {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, NEXTHOPS_PER_CHUNK);
	__type(key, __u32);
	__type(value, struct nexthop_slot);
} nexthops_chunk SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, COUNTER_CHUNKS *COUNTERS_PER_CHUNK / NEXTHOPS_PER_CHUNK);
	__type(key, __u32);
	__array(values, struct nexthops_chunk);
} nexthops SEC(".maps");

/*
 * State: the lease of `nexthops`: until when MAC addresses and health are to be believed. arpd
 * renews it; when arpd is gone it runs out.
 */
struct heartbeat {
	__u64 until;	   /* bpf_jiffies64: the one clock that costs the program nothing */
	__u64 until_ktime; /* the same in nanoseconds of CLOCK_MONOTONIC, for user space */
};
SIZE_IS(struct heartbeat, 16);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct heartbeat);
} heartbeat SEC(".maps");

/* State: what `drain` and `enable` say of upstreams, by id, whatever the configuration says. */
#define OVERRIDES_PER_WORD 32

enum override {
	OVERRIDE_NONE,
	OVERRIDE_DRAINED,
	OVERRIDE_ACTIVE,
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, COUNTER_CHUNKS *COUNTERS_PER_CHUNK / OVERRIDES_PER_WORD);
	__type(key, __u32);
	__type(value, __u64); /* two bits each, the first id's lowest */
} overrides SEC(".maps");

/*
 * State: where the later fragments of a datagram are to go. The key is a hash of addresses and
 * identification under a secret that nobody outside knows; in 64 bits no two meet.
 */
#define MOST_FRAGMENTED 131072

struct fragmented {
	__u32 place;	  /* in `fragment_ring`, while it is there */
	__u32 since;	  /* jiffies */
	__u32 generation; /* that `upstream` and `due` belong to */
	__u32 selection;  /* what selects an upstream, where the generation is another by now */
	__u32 upstream;	  /* index of the one that was selected, plus one; 0: none */
	__u32 identification;
	__u64 due;   /* receivers that get a copy, a bit each */
	__be16 port; /* destination */
	__u16 matched;
	__u32 unused;
};
SIZE_IS(struct fragmented, 40);

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MOST_FRAGMENTED + 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct fragmented);
} fragments SEC(".maps");

/* State: the entries of `fragments` by age: the oldest goes first, and none that is under a second old. */
struct fragment_place {
	__u64 key;
	__u32 since; /* jiffies */
	__u32 used;
};
SIZE_IS(struct fragment_place, 16);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MOST_FRAGMENTED);
	__type(key, __u32);
	__type(value, struct fragment_place);
} fragment_ring SEC(".maps");

/* State: what is handed out one by one. */
struct tickets {
	struct bpf_spin_lock lock;
	__u32 place;	      /* the next in `fragment_ring` */
	__u32 identification; /* the next of fragments whose senders merge */
	__u32 unused;
	__u64 secret; /* of the keys of `fragments` */
};
SIZE_IS(struct tickets, 24);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct tickets);
} tickets SEC(".maps");

/* Generation: how many ICMP errors may be sent. */
struct budget {
	struct bpf_spin_lock lock;
	__u32 tokens;
	__u64 filled; /* jiffies */
};
SIZE_IS(struct budget, 16);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct budget);
} budget SEC(".maps");

/* State: what `udplb trace` wants to hear of, for as long as it says so again and again. */
struct trace {
	__u64 until;  /* nanoseconds of CLOCK_MONOTONIC; 0: nothing */
	__u32 rule;   /* id; 0: any */
	__u32 sample; /* every so manieth packet */
	__u32 drops;  /* what was not sent, only */
	__u32 frames; /* the bytes too */
	__u32 source_bits;
	__u32 destination_bits;
	__be32 source[4];
	__be32 destination[4];
	__u32 passed; /* of those that are sampled */
	__u32 lost;   /* events that there was no room for */
};
SIZE_IS(struct trace, 72);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct trace);
} tracing SEC(".maps");

/* State: what became of a packet, or of one copy of it. Without the frames where they are not asked for. */
#define SNAPSHOT 128

struct snapshot {
	__u32 length; /* of the frame */
	__u32 there;  /* bytes of it that are here */
	__u8 bytes[SNAPSHOT];
};

struct event {
	__u64 time; /* nanoseconds of CLOCK_MONOTONIC, when it came */
	__u32 interface;
	__u32 generation;
	__u32 rule;	/* id */
	__u32 upstream; /* id; 0: none */
	enum verdict verdict;
	__u32 length; /* of the frame */
	__u32 key;    /* that selected the upstream, and the slot of the rule's table */
	__u32 slot;
	__u16 ipv6;
	__u16 fragment; /* not the first: there are no ports */
	__be16 source_port;
	__be16 port;
	__be32 source[4];
	__be32 destination[4];
	__be32 gateway[4]; /* the neighbour that was to be asked for, where it was */
	__u32 out;	   /* interface; 0: none */
	__u8 macs[12];	   /* destination and source; zeroes: none */
	struct snapshot came;
	struct snapshot left;
};
SIZE_IS(struct event, 112 + 2 * sizeof(struct snapshot));

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

/* The event in the making. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct event);
} drafts SEC(".maps");

/* State: the configuration that `rollback` left, and that `apply` therefore refuses; not read by the program.
 */
struct held {
	__u64 since; /* seconds since 1970; 0: nothing is held */
	__u32 generation;
	__u32 unused;
};
SIZE_IS(struct held, 16);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct held);
} held SEC(".maps");

#endif
