// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* What udplb is measured against and with: floors, a generator of packets, and a sink. */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

struct frame {
	struct ethhdr eth;
	struct iphdr ip;
	struct udphdr udp;
} __attribute__((packed));

/* The headers of the packet that is measured. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct frame);
} frame SEC(".maps");

/* The floors, and udplb's own program. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, __u32);
} measured SEC(".maps");

/*
 * A test run feeds the packet that a program left to its next run, so each of them starts with
 * the packet put right. cb[0] says which program is measured, cb[1] where its clones go.
 */
SEC("tc")
int start(struct __sk_buff *skb)
{
	struct frame *original;
	__u32 zero = 0;

	original = bpf_map_lookup_elem(&frame, &zero);
	if (!original || bpf_skb_store_bytes(skb, 0, original, sizeof(*original), 0))
		return TC_ACT_SHOT;
	bpf_tail_call(skb, &measured, skb->cb[0]);
	return TC_ACT_SHOT;
}

SEC("tc")
int at_once(struct __sk_buff *skb __attribute__((unused)))
{
	return TC_ACT_UNSPEC;
}

/* As udplb asks whether it is to tell of packets. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} asked SEC(".maps");

SEC("tc")
int flag(struct __sk_buff *skb __attribute__((unused)))
{
	__u32 zero = 0;
	__u64 *until = bpf_map_lookup_elem(&asked, &zero);

	return until && *until ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

/* As the rules of udplb. */
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

SEC("tc")
int clone(struct __sk_buff *skb)
{
	return bpf_clone_redirect(skb, skb->cb[1], 0) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

#define FLOWS 16

/* A run of the generator, which ends when all packets that are wanted have arrived. */
struct progress {
	__u64 generated;
	__u64 at_upstream;
	__u64 at_socket;
	__u64 wanted; /* arrivals, at upstream and socket */
	__u64 started;
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

/* Makes the frame a packet of one of 16 flows; the checksum of `frame` is 16 or more. */
SEC("xdp")
int generate(struct xdp_md *context)
{
	struct frame *packet = (void *)(long)context->data;
	struct progress *progress = get_progress();
	struct frame *original;
	__u32 flow, zero = 0;

	original = bpf_map_lookup_elem(&frame, &zero);
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

static __always_inline void arrive(struct progress *progress, __u64 *place)
{
	++*place;
	if (progress->at_upstream + progress->at_socket == progress->wanted)
		progress->ended = bpf_ktime_get_ns();
}

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

/* Of a socket: delivery ends here, since reading would cost all competitors the same. */
SEC("socket")
int socket_filter(struct __sk_buff *skb __attribute__((unused)))
{
	struct progress *progress = get_progress();

	if (progress)
		arrive(progress, &progress->at_socket);
	return 0;
}

const char LICENSE[] SEC("license") = "Dual BSD/GPL";
