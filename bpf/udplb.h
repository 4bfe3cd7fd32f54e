/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The contract between the program and user space: every struct directly above the map
 * that holds it. Rust sees these definitions through the generated skeleton and nowhere else.
 *
 * Addresses and ports are in network byte order, everything else in host byte order.
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
};

enum source {
	SOURCE_VIP,	 /* the matched destination address */
	SOURCE_PRESERVE, /* the sender's own address */
};

/* Where a packet that matched a rule ended: exactly one of these is counted for it. */
enum verdict {
	VERDICT_FORWARDED,
	VERDICT_STALE_NEIGHBOUR, /* sent, to a MAC address that nobody vouches for any more */
	VERDICT_NO_ROUTE,
	VERDICT_NO_NEIGHBOUR,
	VERDICT_MTU,
	VERDICT_TTL,
	VERDICT_FRAGMENT,
	VERDICT_NO_UPSTREAM,
	VERDICT_CLONE_FAILED, /* no memory to change or copy the packet, or the copy was refused */
	VERDICT_MALFORMED,
	VERDICT_NOT_FOR_US, /* untouched: the frame is for another host */
	VERDICTS,
};

/* Generation: the key entries. A port range is an entry for each of its ports. */
struct rule_key {
	__be32 address;
	__be16 port;
	__u16 unused;
};
SIZE_IS(struct rule_key, 8);

struct rule {
	__u32 id; /* in `counters` */
	__u32 first_slot;
	__u32 slots;
	enum action action;
	enum strategy strategy;
	enum source source;
	__u32 skip_down; /* an upstream that is down is not selected */
};
SIZE_IS(struct rule, 28);

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct rule_key);
	__type(value, struct rule);
} rules SEC(".maps");

/* Generation: slot -> index in `upstreams`, packed because an array element takes 8 bytes at least. */
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

/* Generation: the upstreams of all rules. */
struct upstream {
	__u32 id; /* in `counters` and `nexthops` */
	__be32 address;
	__be16 port; /* 0: the port that the packet came to */
	__u16 unused;
};
SIZE_IS(struct upstream, 12);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct upstream);
} upstreams SEC(".maps");

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
} config SEC(".maps");

/*
 * State: what was counted under an id of a rule or an upstream; id 0 is for what belongs to
 * no rule. The outer array is fixed and its inner maps are made on demand, so that the table
 * grows while programs of two generations write it.
 */
#define COUNTERS_PER_CHUNK 1024
#define COUNTER_CHUNKS 512

struct counter {
	__u64 packets; /* a GSO packet is its segments, here and below */
	__u64 bytes;   /* with the Ethernet header, without VLAN tag and FCS */
};

struct counters {
	struct counter of[16]; /* by verdict; with room, so that a new one does not reset the others */
};
SIZE_IS(struct counters, 256);
_Static_assert(VERDICTS <= 16, "a verdict has no counter");

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
	MACS_NONE,  /* the device has no MAC addresses: none is needed */
};

enum health {
	HEALTH_UNKNOWN,
	HEALTH_UP,
	HEALTH_STALE, /* a probe is not answered yet */
	HEALTH_DOWN,
};

/* An IPv4 address is the first word of four, and the rest is 0. */
struct nexthop {
	__be32 address[4]; /* the upstream's; the entry is for nobody else, whatever its id says */
	__be32 gateway[4]; /* the neighbour to ask for: the upstream itself where it is on the link */
	__be32 egress[4];  /* this host's own address on that way; 0: unknown */
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
