// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Programs for measurements: floors that udplb is compared with, a packet generator, and sinks. */
#include <stdbool.h>
#include <stddef.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
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

/* A UDP packet over IPv6 without extension headers. */
struct frame6 {
	struct ethhdr eth;
	struct ipv6hdr ip;
	struct udphdr udp;
} __attribute__((packed));

/* First bytes of the measured packet: all that a program rewrites, up to IPv6 with a fragment header and UDP.
 */
struct beginning {
	__u64 words[9];
	/* of a generator; the tc programs do not read them */
	__u32 flows;
	__u32 clients; /* that share the flows: addresses of IPv4 */
	__u64 first;   /* number of packets generated before */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct beginning);
} beginning SEC(".maps");

/* Restores the first bytes of a packet by wide stores. Returns what they come from; NULL if it is too short.
 */
static __always_inline const struct beginning *restore(__u64 *packet, const void *end)
{
	const __u32 only = 0;
	const struct beginning *original = bpf_map_lookup_elem(&beginning, &only);
	__u32 i;

	if (!original || (const void *)packet + sizeof(original->words) > end)
		return NULL;
#pragma unroll
	for (i = 0; i < sizeof(original->words) / sizeof(original->words[0]); i++)
		packet[i] = original->words[i];
	return original;
}

/* Interface that an attached floor sends to; 0: the one in cb[1], for test runs. */
volatile const __u32 out = 0;

static __always_inline __u32 target(const struct __sk_buff *skb)
{
	return out ?: skb->cb[1];
}

/* The measured programs: the floors, and udplb. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 32);
	__type(key, __u32);
	__type(value, __u32);
} measured SEC(".maps");

/* Replaces four bytes of the IPv4 header, at `offset` in the frame, and corrects its checksum. */
static __always_inline void replace(struct __sk_buff *skb, __u32 offset, __be32 new)
{
	const __u32 checksum = sizeof(struct ethhdr) + offsetof(struct iphdr, check);
	__be32 old;

	bpf_skb_load_bytes(skb, offset, &old, sizeof(old));
	bpf_skb_store_bytes(skb, offset, &new, sizeof(new), 0);
	bpf_l3_csum_replace(skb, checksum, old, new, sizeof(new));
}

/* Addresses the packet to one of `rules` rules: 256 ports from 10000 on of each address from 10.100.0.0 on.
 */
static __always_inline void pick_rule(struct __sk_buff *skb, __u32 rules)
{
	__u32 rule = (__u64)bpf_get_prandom_u32() * rules >> 32;
	__be16 port = bpf_htons(10000 + rule % 256);

	replace(skb, offsetof(struct frame, ip.daddr), bpf_htonl((10 << 24 | 100 << 16) + rule / 256));
	bpf_skb_store_bytes(skb, offsetof(struct frame, udp.dest), &port, sizeof(port), 0);
}

/*
 * Restores the packet and runs a measured program: BPF_PROG_TEST_RUN repeats with the packet that the program
 * left. cb[0] is the program's index, cb[1] the interface for clones, cb[2] their number, cb[3] the offset of
 * the IPv4 sender, which is random in each packet (0: it stays), and cb[4] the number of rules of which each
 * packet is for a random one (0: it stays).
 */
SEC("tc")
int start(struct __sk_buff *skb)
{
	if (!restore((void *)(long)skb->data, (void *)(long)skb->data_end))
		return TC_ACT_SHOT;
	if (skb->cb[3]) {
		/* in 11.0.0.0/8, since some networks are martian */
		replace(skb, skb->cb[3], bpf_htonl(11 << 24 | bpf_get_prandom_u32() >> 8));
	}
	if (skb->cb[4])
		pick_rule(skb, skb->cb[4]);
	bpf_tail_call(skb, &measured, skb->cb[0]);
	return TC_ACT_SHOT;
}

/* The least that a program costs. */
SEC("tc")
int at_once(struct __sk_buff *skb __attribute__((unused)))
{
	return TC_ACT_UNSPEC;
}

/* Maps of rules by address and port: few for IPv4 and for IPv6, and many. */
struct key {
	__be32 address;
	__be32 port;
};

struct key6 {
	__be32 address[4];
	__be32 port;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2);
	__type(key, struct key);
	__type(value, __u8[24]);
} keys SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2);
	__type(key, struct key6);
	__type(value, __u8[24]);
} keys6 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, struct key);
	__type(value, __u8[24]);
} many SEC(".maps");

/* Parses a packet over IPv4, and looks its address and port up in a map. */
static __always_inline bool is_known(struct frame *packet, const void *end, void *map)
{
	struct key key = {};

	if ((void *)(packet + 1) > end || packet->eth.h_proto != bpf_htons(ETH_P_IP) ||
	    packet->ip.version != 4 || packet->ip.ihl != 5 || packet->ip.protocol != IPPROTO_UDP ||
	    packet->ip.frag_off & bpf_htons(0x3fff))
		return false;
	key.address = packet->ip.daddr;
	key.port = packet->udp.dest;
	return bpf_map_lookup_elem(map, &key);
}

static __always_inline int redirect_known(struct __sk_buff *skb, void *map)
{
	if (!is_known((void *)(long)skb->data, (void *)(long)skb->data_end, map))
		return TC_ACT_UNSPEC;
	return bpf_redirect(target(skb), 0);
}

/* The cost of a redirect. */
SEC("tc")
int redirect(struct __sk_buff *skb)
{
	return bpf_redirect(target(skb), 0);
}

/* The cost of parsing, of a lookup, and of a redirect. */
SEC("tc")
int look_up(struct __sk_buff *skb)
{
	return redirect_known(skb, &keys);
}

/* The same before there is an skb. */
SEC("xdp")
int xdp_look_up(struct xdp_md *xdp)
{
	if (!is_known((void *)(long)xdp->data, (void *)(long)xdp->data_end, &keys))
		return XDP_PASS;
	return bpf_redirect(out, 0);
}

/* The same with many keys. */
SEC("tc")
int look_up_many(struct __sk_buff *skb)
{
	return redirect_known(skb, &many);
}

/* The same for IPv6. */
SEC("tc")
int look_up6(struct __sk_buff *skb)
{
	struct frame6 *packet = (void *)(long)skb->data;
	struct key6 key = {};

	if ((void *)(packet + 1) > (void *)(long)skb->data_end ||
	    packet->eth.h_proto != bpf_htons(ETH_P_IPV6) || packet->ip.version != 6 ||
	    packet->ip.nexthdr != IPPROTO_UDP)
		return TC_ACT_UNSPEC;
	__builtin_memcpy(key.address, &packet->ip.daddr, sizeof(key.address));
	key.port = packet->udp.dest;
	if (!bpf_map_lookup_elem(&keys6, &key))
		return TC_ACT_UNSPEC;
	return bpf_redirect(target(skb), 0);
}

/* The cost of a clone. */
SEC("tc")
int clone(struct __sk_buff *skb)
{
	return bpf_clone_redirect(skb, target(skb), 0) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
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

/* Order of the flows: a prime, so that neighbours in time are not neighbours in number. */
#define STRIDE 7919

/* Adds to the source port of a datagram. */
static __always_inline void add_to_port(void *header, __u32 more)
{
	struct udphdr *udp = header;
	__be16 old = udp->source;

	udp->source = bpf_htons(bpf_ntohs(old) + more);
	udp->check = ~fold((__u64)(__u16)~udp->check + (__u16)~old + udp->source);
}

/* Makes the packet one of a flow: of a client, and of its port. */
static __always_inline void set_flow(struct frame *packet, __u32 client, __u32 port)
{
	__be32 old = packet->ip.saddr, new = bpf_htonl(bpf_ntohl(old) + client);

	packet->ip.saddr = new;
	packet->ip.check = ~fold((__u64)(__u16)~packet->ip.check + (__u32)~old + new);
	packet->udp.check = ~fold((__u64)(__u16)~packet->udp.check + (__u32)~old + new);
	add_to_port(&packet->udp, port);
}

/* Turns the frame into a packet of the next flow. */
static __always_inline bool make_packet(struct xdp_md *context)
{
	void *packet = (void *)(long)context->data;
	struct progress *progress = get_progress();
	const struct beginning *original;
	struct frame6 *packet6 = packet;
	__u32 flow;

	if (!progress)
		return false;
	if (!progress->generated)
		progress->started = bpf_ktime_get_ns();
	original = restore(packet, (void *)(long)context->data_end);
	if (!original)
		return false;
	flow = (original->first + progress->generated++) * STRIDE % (original->flows ?: 1);
	if (packet6->eth.h_proto == bpf_htons(ETH_P_IPV6))
		add_to_port(&packet6->udp, flow);
	else
		set_flow(packet, flow % (original->clients ?: 1), flow / (original->clients ?: 1));
	return true;
}

SEC("xdp")
int generate(struct xdp_md *context)
{
	return make_packet(context) ? XDP_PASS : XDP_ABORTED;
}

/* The same, onto the wire behind the interface. */
SEC("xdp")
int generate_out(struct xdp_md *context)
{
	return make_packet(context) ? bpf_redirect(context->ingress_ifindex, 0) : XDP_ABORTED;
}

/* Counts an arrival. */
static __always_inline void arrive(struct progress *progress, __u64 *place)
{
	++*place;
	if (progress->at_upstream + progress->at_socket == progress->wanted)
		progress->ended = bpf_ktime_get_ns();
}

/* Returns true for a packet of a generator; one in a tunnel may have an IP header as its payload. */
static __always_inline bool is_udp(const struct frame *packet)
{
	if (packet->eth.h_proto == bpf_htons(ETH_P_IPV6))
		return ((const struct frame6 *)packet)->ip.nexthdr == IPPROTO_UDP;
	return packet->eth.h_proto == bpf_htons(ETH_P_IP) &&
	       (packet->ip.protocol == IPPROTO_UDP || packet->ip.protocol == IPPROTO_IPIP);
}

/* An upstream of DNS: sends a question back as its answer, or any other datagram as it is but for this bit.
 */
SEC("tc")
int echo(struct __sk_buff *skb)
{
	struct frame *packet = (void *)(long)skb->data;
	__u16 *flags = (void *)(packet + 1) + 2, old;
	struct ethhdr eth;
	__be32 address;
	__be16 port;

	if ((void *)(flags + 1) > (void *)(long)skb->data_end || !is_udp(packet))
		return TC_ACT_UNSPEC;
	eth = packet->eth;
	__builtin_memcpy(packet->eth.h_dest, eth.h_source, ETH_ALEN);
	__builtin_memcpy(packet->eth.h_source, eth.h_dest, ETH_ALEN);
	address = packet->ip.saddr;
	packet->ip.saddr = packet->ip.daddr;
	packet->ip.daddr = address;
	port = packet->udp.source;
	packet->udp.source = packet->udp.dest;
	packet->udp.dest = port;
	old = *flags;
	*flags |= bpf_htons(0x8000);
	if (packet->udp.check)
		packet->udp.check = ~fold((__u64)(__u16)~packet->udp.check + (__u16)~old + *flags);
	return bpf_redirect(skb->ifindex, 0);
}

/* Takes packets at their destination, or on their way out to it, and counts them. */
SEC("tc")
int sink(struct __sk_buff *skb)
{
	struct frame *packet = (void *)(long)skb->data;
	struct progress *progress = get_progress();

	if (progress && (void *)(packet + 1) <= (void *)(long)skb->data_end && is_udp(packet))
		arrive(progress, &progress->at_upstream);
	return TC_ACT_STOLEN;
}

/* The same before there is an skb. */
SEC("xdp")
int xdp_sink(struct xdp_md *xdp)
{
	struct frame *packet = (void *)(long)xdp->data;
	struct progress *progress = get_progress();

	if (progress && (void *)(packet + 1) <= (void *)(long)xdp->data_end && is_udp(packet))
		arrive(progress, &progress->at_upstream);
	return XDP_DROP;
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
