/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Forwards ICMP errors where upstreams answer clients: those about what went to an upstream come from where
 * the client had sent to, and those about an answer go to the upstream that the client's packets go to.
 */
#ifndef UDPLB_ICMP_ANSWERS_H
#define UDPLB_ICMP_ANSWERS_H

#define ICMP_PARAMETER_PROBLEM 12
#define ICMPV6_DEST_UNREACH 1
#define ICMPV6_PARAMETER_PROBLEM 4

#define FORWARDED_ERRORS_PER_SECOND 1000
#define FORWARDED_ERRORS_BURST 50

/* An ICMP error without IPv4 options or IPv6 extension headers, and the beginning of what it quotes. */
struct quoted4 {
	struct iphdr ip;
	struct icmp icmp;
	struct iphdr inner;
	struct udphdr udp;
};

struct quoted6 {
	struct ipv6hdr ip;
	struct icmp icmp;
	struct ipv6hdr inner;
	struct udphdr udp;
};

/* An error that is forwarded, and its new headers. Addresses of IPv4 have zeroes behind them. */
struct error {
	union {
		struct quoted4 v4;
		struct quoted6 v6;
	};
	/* the quoted datagram's ends: as it came, then as its sender knows them */
	__be32 from[4];
	__be32 to[4];
	__be16 from_port;
	__be16 to_port;
	/* the error's own ends, as it leaves */
	__be32 source[4];
	__be32 destination[4];
	__u32 index; /* in `upstreams` */
};

/* Per CPU, see xmit_scratch. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct error);
} error_scratch SEC(".maps");

static __always_inline struct error *get_error(void)
{
	const __u32 only = 0;

	return features.origins || features.direct ? bpf_map_lookup_elem(&error_scratch, &only) : NULL;
}

/* Returns true for an ICMPv4 error about a packet. */
static __always_inline bool is_error4(__u8 type)
{
	return type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETER_PROBLEM;
}

/* Loads an IPv4 error about a datagram that its receiver has sent. Returns false for other packets. */
static __always_inline bool load_error4(struct __sk_buff *skb, struct error *error)
{
	struct quoted4 *quoted = &error->v4;

	return !bpf_skb_load_bytes(skb, sizeof(struct ethhdr), quoted, sizeof(*quoted)) &&
	       *(__u8 *)&quoted->ip == 0x45 && !(quoted->ip.frag_off & bpf_htons(IP_OFFSET | IP_MF)) &&
	       *(__u8 *)&quoted->inner == 0x45 && !(quoted->inner.frag_off & bpf_htons(IP_OFFSET)) &&
	       quoted->inner.protocol == IPPROTO_UDP && is_error4(quoted->icmp.type) && quoted->ip.ttl > 1 &&
	       quoted->ip.daddr == quoted->inner.saddr;
}

/* Likewise for IPv6. */
static __always_inline bool load_error6(struct __sk_buff *skb, struct error *error)
{
	struct quoted6 *quoted = &error->v6;

	return !bpf_skb_load_bytes(skb, sizeof(struct ethhdr), quoted, sizeof(*quoted)) &&
	       quoted->ip.nexthdr == IPPROTO_ICMPV6 && quoted->inner.nexthdr == IPPROTO_UDP &&
	       quoted->icmp.type >= ICMPV6_DEST_UNREACH && quoted->icmp.type <= ICMPV6_PARAMETER_PROBLEM &&
	       quoted->ip.hop_limit > 1 &&
	       is_same_address(quoted->ip.daddr.in6_u.u6_addr32, quoted->inner.saddr.in6_u.u6_addr32);
}

/* Stores both ends of the error and of the quoted datagram. */
static __always_inline void store_ends(struct error *error, bool ipv6)
{
	const struct udphdr *udp = ipv6 ? &error->v6.udp : &error->v4.udp;
	const void *from = ipv6 ? (void *)&error->v6.inner.saddr : (void *)&error->v4.inner.saddr;
	const void *to = ipv6 ? (void *)&error->v6.inner.daddr : (void *)&error->v4.inner.daddr;
	const void *source = ipv6 ? (void *)&error->v6.ip.saddr : (void *)&error->v4.ip.saddr;

	copy_address(error->from, from, ipv6);
	copy_address(error->to, to, ipv6);
	copy_address(error->source, source, ipv6);
	copy_address(error->destination, from, ipv6);
	error->from_port = udp->source;
	error->to_port = udp->dest;
}

/*
 * Recognises an error about what went to an upstream whose answers are routed through this host: it comes
 * from the origin, and quotes what the client had sent there.
 */
static __always_inline bool aim_at_client(struct error *error, bool ipv6)
{
	const struct upstream *answers;

	if (!features.origins || !match_answer(error->to, error->from, error->to_port, ipv6, &error->index))
		return false;
	answers = bpf_map_lookup_elem(&upstreams, &error->index);
	if (!answers)
		return false;
	__builtin_memcpy(error->source, answers->address, sizeof(error->source));
	__builtin_memcpy(error->to, answers->address, sizeof(error->to));
	if (answers->port)
		error->to_port = answers->port;
	return true;
}

/* Returns the key of the strategy of the client's own packets; the quoted one went to it. */
static __always_inline __u32 client_key(const struct error *error, const struct rule *rule, bool ipv6)
{
	struct udphdr udp = {.source = error->to_port};
	struct ipv6hdr ip6 = {};
	struct pkt pkt = {.is_ipv6 = ipv6, .udp = &udp};

	pkt.ip6 = &ip6;
	if (ipv6)
		__builtin_memcpy(&ip6.saddr, error->to, sizeof(ip6.saddr));
	else
		pkt.ip->saddr = error->to[0];
	return sender_key(&pkt, rule->strategy, rule->flags & RULE_HASHES);
}

/* Recognises an error about an answer, which goes to the upstream that has answered. */
static __always_inline bool aim_at_upstream(struct error *error, bool ipv6)
{
	const struct rule *rule = match(error->to, error->from, error->from_port, ipv6);
	const struct upstream *upstream;
	__u32 selected;

	if (!rule || !(rule->flags & RULE_REPLIES) || rule->strategy > STRATEGY_SRC_IP_PORT)
		return false;
	selected = select_upstream(rule, rule->slots > 1 ? client_key(error, rule, ipv6) : 0);
	if (!selected)
		return false;
	error->index = selected - 1;
	upstream = bpf_map_lookup_elem(&upstreams, &error->index);
	if (!upstream)
		return false;
	if (upstream->via != VIA_ADDRESS)
		return true;
	__builtin_memcpy(error->destination, upstream->address, sizeof(error->destination));
	__builtin_memcpy(error->from, upstream->address, sizeof(error->from));
	if (upstream->port)
		error->from_port = upstream->port;
	return true;
}

/* Loads an error and finds out whom it is for. Returns false for packets that are left to the stack. */
__noinline __u32 aim_error(struct __sk_buff *skb, __u32 ipv6)
{
	struct error *error = get_error();

	if (!error)
		return false;
	__builtin_memset(error, 0, sizeof(*error));
	if (!(features.ipv6 && ipv6 ? load_error6(skb, error) : load_error4(skb, error)))
		return false;
	store_ends(error, features.ipv6 && ipv6);
	return aim_at_client(error, features.ipv6 && ipv6) || aim_at_upstream(error, features.ipv6 && ipv6);
}

/* Replaces a word or half of one; returns what this adds to a sum. */
static __always_inline __u64 replace_word(__be32 *word, __be32 to)
{
	__u64 added = CSUM_REPLACE(__u32, *word, to);

	*word = to;
	return added;
}

static __always_inline __u64 replace_half(__be16 *half, __be16 to)
{
	__u64 added = CSUM_REPLACE(__u16, *half, to);

	*half = to;
	return added;
}

static __always_inline __u64 replace_address(__be32 *address, const __be32 *to)
{
	return replace_word(&address[0], to[0]) + replace_word(&address[1], to[1]) +
	       replace_word(&address[2], to[2]) + replace_word(&address[3], to[3]);
}

/* Adds to a checksum. Returns what the change adds to a sum that covers it. */
static __always_inline __u64 adjust_checksum(__u16 *check, __u64 added)
{
	return replace_half((__be16 *)check, ~fold16((__u16) ~*check + (__u64)fold32(added)));
}

/* Rewrites the quoted UDP header; `added` is what changes in its pseudo-header. Returns all that is added. */
static __always_inline __u64 rewrite_quoted_udp(struct udphdr *udp, const struct error *error, __u64 added)
{
	added += replace_half(&udp->source, error->from_port) + replace_half(&udp->dest, error->to_port);
	if (udp->check) {
		added += adjust_checksum(&udp->check, added);
		/* a computed zero is sent as ones, which adds the same */
		udp->check = udp->check ?: 0xffff;
	}
	return added;
}

static __always_inline void rewrite_error4(struct error *error)
{
	struct quoted4 *quoted = &error->v4;
	__u64 inner = replace_word(&quoted->inner.saddr, error->from[0]) +
		      replace_word(&quoted->inner.daddr, error->to[0]);
	__u64 added = rewrite_quoted_udp(&quoted->udp, error, inner);

	added += adjust_checksum(&quoted->inner.check, inner);
	adjust_checksum(&quoted->icmp.checksum, added);
	quoted->ip.ttl--;
	adjust_checksum(&quoted->ip.check, bpf_htons(0xfeff) +
						   replace_word(&quoted->ip.saddr, error->source[0]) +
						   replace_word(&quoted->ip.daddr, error->destination[0]));
}

static __always_inline void rewrite_error6(struct error *error)
{
	struct quoted6 *quoted = &error->v6;
	__u64 inner = replace_address(quoted->inner.saddr.in6_u.u6_addr32, error->from) +
		      replace_address(quoted->inner.daddr.in6_u.u6_addr32, error->to);
	__u64 added = rewrite_quoted_udp(&quoted->udp, error, inner);

	added += replace_address(quoted->ip.saddr.in6_u.u6_addr32, error->source) +
		 replace_address(quoted->ip.daddr.in6_u.u6_addr32, error->destination);
	adjust_checksum(&quoted->icmp.checksum, added);
	quoted->ip.hop_limit--;
}

/* Rewrites an error in place. Returns false on failure. */
__noinline __u32 rewrite_error(struct __sk_buff *skb, __u32 ipv6)
{
	const __u32 offset = sizeof(struct ethhdr);
	struct error *error = get_error();

	if (!error)
		return false;
	if (features.ipv6 && ipv6) {
		rewrite_error6(error);
		return !bpf_skb_store_bytes(skb, offset, &error->v6, sizeof(error->v6), BPF_F_RECOMPUTE_CSUM);
	}
	rewrite_error4(error);
	return !bpf_skb_store_bytes(skb, offset, &error->v4, sizeof(error->v4), BPF_F_RECOMPUTE_CSUM);
}

/* Stores in the scratch where an error goes. Returns false if the upstream is gone. */
static __always_inline bool address_error(const struct error *error, struct xmit *xmit)
{
	const struct upstream *upstream = bpf_map_lookup_elem(&upstreams, &error->index);

	if (!upstream)
		return false;
	xmit->upstream = upstream->id;
	xmit->egress_source = false;
	xmit->via = upstream->via;
	xmit->rewrite.port = 0;
	xmit->rewrite.source_port = 0;
	__builtin_memcpy(xmit->rewrite.source, error->source, sizeof(error->source));
	__builtin_memcpy(xmit->rewrite.destination, error->destination, sizeof(error->destination));
	if (is_direct(xmit))
		__builtin_memcpy(xmit->rewrite.destination, upstream->address, sizeof(upstream->address));
	return !is_tunnel(xmit) || egress_address(upstream, xmit->egress);
}

/* Sends a packet on that aim_error() has recognised. Returns the action of the program. */
__noinline int send_error(struct __sk_buff *skb, __u32 ipv6)
{
	__u32 packed = PKT_F_LATER_FRAGMENT | (sizeof(struct ethhdr) + sizeof(struct iphdr));
	const struct error *error = get_error();
	struct xmit *xmit = get_xmit();
	struct pkt pkt;

	if (features.ipv6 && ipv6)
		packed = PKT_F_IPV6 | PKT_F_LATER_FRAGMENT | (sizeof(struct ethhdr) + sizeof(struct ipv6hdr));
	pkt = pkt_of(packed);
	if (!error || !xmit || (skb->vlan_present && bpf_skb_vlan_pop(skb)) || !pkt_pull(skb, &pkt) ||
	    !address_error(error, xmit) ||
	    !is_sent(
		    resolve_nexthop(skb, &pkt, total_length(&pkt) + outer_length(xmit, pkt.is_ipv6), xmit)) ||
	    !rewrite_error(skb, ipv6) || !pkt_locate(skb, &pkt))
		return TC_ACT_SHOT;
	copy_macs(pkt.eth, xmit->hop.macs);
	xmit->checksum = checksum_state(skb, &pkt);
	if (is_tunnel(xmit) && (!fill_outer(skb, packed) || !push_outer(skb, ipv6)))
		return TC_ACT_SHOT;
	return redirect(skb, xmit);
}

/* Processes an ICMP packet behind an Ethernet header. Returns the action of the program. */
static __always_inline int forward_error(struct __sk_buff *skb)
{
	bool ipv6 = skb->protocol == bpf_htons(ETH_P_IPV6);

	if (features.dry_run || !is_for_us(skb) || !aim_error(skb, ipv6))
		return TC_ACT_UNSPEC;
	if (!take_token(BUDGET_FORWARDED_ERRORS, FORWARDED_ERRORS_BURST, FORWARDED_ERRORS_PER_SECOND))
		return TC_ACT_SHOT;
	return send_error(skb, ipv6);
}

#endif
