// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Programs for measurements: floors that udplb is compared with, a packet generator, and sinks. */
#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

/* A UDP packet over IPv4 without options. */
struct frame {
	struct ethhdr eth;
	struct iphdr ip;
	struct udphdr udp;
} __attribute__((packed));

/* First bytes of the measured packet: all that a program rewrites, up to IPv6 with a fragment header and UDP.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u8[72]);
} beginning SEC(".maps");

/* The measured programs: the floors, and udplb. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 16);
	__type(key, __u32);
	__type(value, __u32);
} measured SEC(".maps");

/*
 * Restores the packet and runs a measured program: BPF_PROG_TEST_RUN repeats with the packet that the program
 * left. cb[0] is the program's index, cb[1] the interface for clones, cb[2] their number, and cb[3] the
 * offset of four bytes that are random in each packet (0: none).
 */
SEC("tc")
int start(struct __sk_buff *skb)
{
	const __u32 only = 0;
	void *original = bpf_map_lookup_elem(&beginning, &only);
	__u32 random;

	if (!original || bpf_skb_store_bytes(skb, 0, original, 72, 0))
		return TC_ACT_SHOT;
	if (skb->cb[3]) {
		random = bpf_get_prandom_u32();
		bpf_skb_store_bytes(skb, skb->cb[3], &random, sizeof(random), 0);
	}
	bpf_tail_call(skb, &measured, skb->cb[0]);
	return TC_ACT_SHOT;
}

/* The least that a program costs. */
SEC("tc")
int at_once(struct __sk_buff *skb __attribute__((unused)))
{
	return TC_ACT_UNSPEC;
}

/* A flag in a map, as udplb has for tracing. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} asked SEC(".maps");

/* The cost of testing the flag. */
SEC("tc")
int flag(struct __sk_buff *skb __attribute__((unused)))
{
	__u32 zero = 0;
	__u64 *until = bpf_map_lookup_elem(&asked, &zero);

	return until && *until ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

/* A map like udplb's `rules`. */
struct key {
	__be32 address;
	__be32 port;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2);
	__type(key, struct key);
	__type(value, __u8[24]);
} keys SEC(".maps");

/* The cost of parsing, of a lookup, and of a redirect. */
SEC("tc")
int look_up(struct __sk_buff *skb)
{
	struct frame *packet = (void *)(long)skb->data;
	struct key key = {};

	if ((void *)(packet + 1) > (void *)(long)skb->data_end ||
	    packet->eth.h_proto != bpf_htons(ETH_P_IP) || packet->ip.version != 4 || packet->ip.ihl != 5 ||
	    packet->ip.protocol != IPPROTO_UDP || packet->ip.frag_off & bpf_htons(0x3fff))
		return TC_ACT_UNSPEC;
	key.address = packet->ip.daddr;
	key.port = packet->udp.dest;
	if (!bpf_map_lookup_elem(&keys, &key))
		return TC_ACT_UNSPEC;
	return bpf_redirect(skb->cb[1], 0);
}

#define AF_INET 2
#define AF_INET6 10

/* The cost of a FIB lookup for the upstream 10.0.2.2 or fd00:2::2. */
SEC("tc")
int route(struct __sk_buff *skb)
{
	struct bpf_fib_lookup fib = {
		.family = AF_INET,
		.l4_protocol = IPPROTO_UDP,
		.tot_len = 100,
		.ifindex = skb->ifindex,
	};

	if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		fib.family = AF_INET6;
		fib.ipv6_src[0] = bpf_htonl(0xfd000001);
		fib.ipv6_src[3] = bpf_htonl(1);
		fib.ipv6_dst[0] = bpf_htonl(0xfd000002);
		fib.ipv6_dst[3] = bpf_htonl(2);
	} else {
		fib.ipv4_src = bpf_htonl(0x0a000101);
		fib.ipv4_dst = bpf_htonl(0x0a000202);
	}
	return bpf_fib_lookup(skb, &fib, sizeof(fib), 0) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

/* The cost of a clone. */
SEC("tc")
int clone(struct __sk_buff *skb)
{
	return bpf_clone_redirect(skb, skb->cb[1], 0) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

/* Receiver of a copy. */
struct receiver {
	__u64 macs;
	__u32 more_macs;
	__be32 address;
	__be16 port;
};

#define MAX_COPIES 64

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_COPIES);
	__type(key, __u32);
	__type(value, struct receiver);
} receivers SEC(".maps");

static __always_inline __u16 fold(__u64 sum)
{
	sum = (__u32)sum + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* Rewritten headers of a frame; MAC addresses by the widest words that the verifier accepts. */
struct originals {
	__u64 macs;
	__u32 more_macs;
	struct iphdr ip;
	struct udphdr udp;
};

/* Sends one copy by the interface in cb[1]: rewrites, clones and restores with the fewest steps possible. */
static __always_inline bool copy(struct __sk_buff *skb, __u32 index)
{
	const struct receiver *to = bpf_map_lookup_elem(&receivers, &index);
	void *packet = (void *)(long)skb->data;
	struct iphdr *ip = packet + sizeof(struct ethhdr);
	struct udphdr *udp = (void *)(ip + 1);
	struct originals original;
	__u64 addresses, ports;

	if (!to || (void *)(udp + 1) > (void *)(long)skb->data_end)
		return false;
	original.macs = *(__u64 *)packet;
	original.more_macs = *(__u32 *)(packet + 8);
	original.ip = *ip;
	original.udp = *udp;
	addresses = (__u64)(__u32)~ip->saddr + to->address;
	ports = (__u64)(__u16)~udp->dest + to->port;
	*(__u64 *)packet = to->macs;
	*(__u32 *)(packet + 8) = to->more_macs;
	ip->saddr = ip->daddr;
	ip->daddr = to->address;
	ip->ttl--;
	ip->check = ~fold((__u16)~ip->check + addresses + (__u16)~bpf_htons(0x100));
	udp->dest = to->port;
	udp->check = ~fold((__u16)~udp->check + addresses + ports);
	if (bpf_clone_redirect(skb, skb->cb[1], 0))
		return false;
	packet = (void *)(long)skb->data;
	ip = packet + sizeof(struct ethhdr);
	udp = (void *)(ip + 1);
	if ((void *)(udp + 1) > (void *)(long)skb->data_end)
		return false;
	*(__u64 *)packet = original.macs;
	*(__u32 *)(packet + 8) = original.more_macs;
	*ip = original.ip;
	*udp = original.udp;
	return true;
}

/* Sends cb[2] copies. */
SEC("tc")
int copies(struct __sk_buff *skb)
{
	__u32 i;

	for (i = 0; i < MAX_COPIES && i < skb->cb[2]; i++) {
		if (!copy(skb, i))
			return TC_ACT_SHOT;
	}
	return TC_ACT_UNSPEC;
}

#define FLOWS 16

/* Progress of a generator run, which ends when all wanted packets have arrived. */
struct progress {
	__u64 generated;
	__u64 at_upstream;
	__u64 at_socket;
	__u64 wanted;  /* arrivals at upstream and socket together */
	__u64 started; /* ns, CLOCK_MONOTONIC, here and below */
	__u64 ended;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct progress);
} progress SEC(".maps");

static __always_inline struct progress *get_progress(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&progress, &zero);
}

/* Turns the frame into a packet of one of 16 flows. The template's UDP checksum is 16 or more. */
SEC("xdp")
int generate(struct xdp_md *context)
{
	struct frame *packet = (void *)(long)context->data;
	struct progress *progress = get_progress();
	struct frame *original;
	__u32 flow, zero = 0;

	original = bpf_map_lookup_elem(&beginning, &zero);
	if (!original || !progress || (void *)(packet + 1) > (void *)(long)context->data_end)
		return XDP_ABORTED;
	if (!progress->generated)
		progress->started = bpf_ktime_get_ns();
	flow = progress->generated++ % FLOWS;
	__builtin_memcpy(packet, original, sizeof(*packet));
	packet->udp.source = bpf_htons(bpf_ntohs(original->udp.source) + flow);
	packet->udp.check = bpf_htons(bpf_ntohs(original->udp.check) - flow);
	return XDP_PASS;
}

/* Counts an arrival. */
static __always_inline void arrive(struct progress *progress, __u64 *place)
{
	++*place;
	if (progress->at_upstream + progress->at_socket == progress->wanted)
		progress->ended = bpf_ktime_get_ns();
}

/* Drops packets at the upstream and counts them. */
SEC("tc")
int sink(struct __sk_buff *skb)
{
	struct frame *packet = (void *)(long)skb->data;
	struct progress *progress = get_progress();

	if (progress && (void *)(packet + 1) <= (void *)(long)skb->data_end &&
	    packet->eth.h_proto == bpf_htons(ETH_P_IP) && packet->ip.protocol == IPPROTO_UDP)
		arrive(progress, &progress->at_upstream);
	return TC_ACT_SHOT;
}

/* Drops packets at a socket and counts them: reading them would cost all programs the same. */
SEC("socket")
int socket_filter(struct __sk_buff *skb __attribute__((unused)))
{
	struct progress *progress = get_progress();

	if (progress)
		arrive(progress, &progress->at_socket);
	return 0;
}

const char LICENSE[] SEC("license") = "Dual BSD/GPL";
