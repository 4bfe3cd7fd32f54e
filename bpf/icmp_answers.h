/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Forwards ICMP errors where upstreams answer clients: those about what went to an upstream come from where
 * the client had sent to, and those about an answer go to the upstream that the client's packets go to. Those
 * about a flow go to its other end, as from this host's address there.
 */
#ifndef UDPLB_ICMP_ANSWERS_H
#define UDPLB_ICMP_ANSWERS_H

#define ICMP_PARAMETER_PROBLEM 12
#define ICMPV6_DEST_UNREACH 1
#define ICMPV6_PARAMETER_PROBLEM 4

#define FORWARDED_ERRORS_PER_SECOND 1000
#define FORWARDED_ERRORS_BURST 50

/* Returns true if ICMP errors may be about answers of upstreams, or about flows. */
static __always_inline bool forwards_errors(void)
{
	return EXTRA(origins) || EXTRA(direct) || EXTRA(flows);
}

/*
 * An ICMP error without IPv6 extension headers, and the beginning of what it quotes. IPv4 options and the
 * quoted fragment header of IPv6, which lie between, are not read.
 */
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
	__u32 index;	   /* in `upstreams` */
	__u32 sticky;	   /* index plus one of the upstream that the client's flow is stuck to; 0: none */
	__u32 icmp_offset; /* in the frame, in bytes */
	__u32 udp_offset;  /* of the quoted header */
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

	return forwards_errors() ? bpf_map_lookup_elem(&error_scratch, &only) : NULL;
}

/* Returns true for an ICMPv4 error about a packet. */
static __always_inline bool is_error4(__u8 type)
{
	return type == ICMP_DEST_UNREACH || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETER_PROBLEM;
}

/* Returns true unless the options of an error are malformed or lead it elsewhere. */
static __always_inline bool has_plain_options(struct __sk_buff *skb, const struct error *error)
{
	__u32 packed = pkt_pack(PKT_F_LATER_FRAGMENT, 0, error->icmp_offset);

	return !has_options(&error->v4.ip) ||
	       (pull(skb, error->icmp_offset) && check_options(skb, packed) == VERDICT_FORWARDED);
}

/* Loads an IPv4 error and the quoted IPv4 header. Returns false for other packets. */
static __always_inline bool load_headers4(struct __sk_buff *skb, struct error *error)
{
	struct quoted4 *quoted = &error->v4;

	if (bpf_skb_load_bytes(skb, sizeof(struct ethhdr), &quoted->ip, sizeof(quoted->ip)) ||
	    quoted->ip.version != 4 || quoted->ip.ihl < 5 ||
	    quoted->ip.frag_off & bpf_htons(IP_OFFSET | IP_MF))
		return false;
	error->icmp_offset = sizeof(struct ethhdr) + quoted->ip.ihl * 4;
	if (bpf_skb_load_bytes(skb, error->icmp_offset, &quoted->icmp,
			       sizeof(quoted->icmp) + sizeof(quoted->inner)) ||
	    quoted->inner.version != 4 || quoted->inner.ihl < 5)
		return false;
	error->udp_offset = error->icmp_offset + sizeof(quoted->icmp) + quoted->inner.ihl * 4;
	return true;
}

/* Loads an IPv4 error about a datagram that its receiver has sent. Returns false for other packets. */
static __always_inline bool load_error4(struct __sk_buff *skb, struct error *error)
{
	struct quoted4 *quoted = &error->v4;

	return load_headers4(skb, error) &&
	       !bpf_skb_load_bytes(skb, error->udp_offset, &quoted->udp, sizeof(quoted->udp)) &&
	       !(quoted->inner.frag_off & bpf_htons(IP_OFFSET)) && quoted->inner.protocol == IPPROTO_UDP &&
	       is_error4(quoted->icmp.type) && quoted->ip.ttl > 1 &&
	       quoted->ip.daddr == quoted->inner.saddr && has_plain_options(skb, error);
}

/* Stores the offset of the quoted UDP header; a first fragment has one. Returns false if there is none. */
static __always_inline bool find_quoted_udp6(struct __sk_buff *skb, struct error *error)
{
	__u8 next = error->v6.inner.nexthdr;
	struct extension extension;

	error->icmp_offset = sizeof(struct ethhdr) + sizeof(struct ipv6hdr);
	error->udp_offset = sizeof(struct ethhdr) + offsetof(struct quoted6, udp);
	if (next == NEXTHDR_FRAGMENT) {
		if (bpf_skb_load_bytes(skb, error->udp_offset, &extension, sizeof(extension)) ||
		    extension.fragment_offset & bpf_htons(0xfff8))
			return false;
		next = extension.next;
		error->udp_offset += sizeof(extension);
	}
	return next == IPPROTO_UDP &&
	       !bpf_skb_load_bytes(skb, error->udp_offset, &error->v6.udp, sizeof(error->v6.udp));
}

/* Loads an IPv6 error as load_error4() does. */
static __always_inline bool load_error6(struct __sk_buff *skb, struct error *error)
{
	struct quoted6 *quoted = &error->v6;

	return !bpf_skb_load_bytes(skb, sizeof(struct ethhdr), quoted, offsetof(struct quoted6, udp)) &&
	       quoted->ip.nexthdr == IPPROTO_ICMPV6 && quoted->icmp.type >= ICMPV6_DEST_UNREACH &&
	       quoted->icmp.type <= ICMPV6_PARAMETER_PROBLEM && quoted->ip.hop_limit > 1 &&
	       is_same_address(quoted->ip.daddr.in6_u.u6_addr32, quoted->inner.saddr.in6_u.u6_addr32) &&
	       find_quoted_udp6(skb, error);
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

	if (!EXTRA(origins) || !match_answer(error->to, error->from, error->to_port, ipv6, &error->index))
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
	__u32 selected = error->sticky;

	if (!rule || !(rule->flags & RULE_REPLIES))
		return false;
	if (!selected && rule->strategy <= STRATEGY_SRC_IP_PORT)
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

/* Stores where an error goes that is about a packet of a flow. Returns false if the flow has ended. */
static __always_inline bool aim_by_flow(struct error *error, __u64 handle, const bool to_client,
					const bool ipv6)
{
	/* the quoted datagram's sender gets the error, from where it had sent to */
	const enum flow_end from = to_client ? FLOW_CLIENT : FLOW_SERVER;
	const enum flow_end to = to_client ? FLOW_VIP : FLOW_EGRESS;
	__u32 target = handle ? find_flow_target(handle, to_client, ipv6) : 0;
	const struct flow *flow = target ? flow_at(handle, ipv6) : NULL;

	if (!flow)
		return false;
	if (!has_port(flow)) {
		error->sticky = target;
		return false;
	}
	error->index = target - 1;
	copy_address(error->from, end_address(flow, from, ipv6), ipv6);
	copy_address(error->to, end_address(flow, to, ipv6), ipv6);
	copy_address(error->source, end_address(flow, to, ipv6), ipv6);
	copy_address(error->destination, end_address(flow, from, ipv6), ipv6);
	error->from_port = flow->ports[from];
	error->to_port = flow->ports[to];
	return version_of(flow) == handle >> 32;
}

static __always_inline bool is_about_flow(struct error *error, const bool ipv6)
{
	struct flow_scratch *packet = get_flow_scratch();

	if (!packet)
		return false;
	/* what came back would be an answer, or a packet of the client */
	describe_packet(packet, error->to, error->from, error->to_port, error->from_port, ipv6);
	packet->handle = 0;
	if (is_flow_port(error->from_port) && find_answered_flow(ipv6, false))
		return aim_by_flow(error, packet->handle, true, ipv6);
	return aim_by_flow(error, find_asking_flow(ipv6), false, ipv6);
}

/* Recognises an error about a packet of a flow, either way. */
__noinline __u32 aim_at_flow(__u32 ipv6)
{
	struct error *error = get_error();

	if (!EXTRA(flows) || !error)
		return false;
	return features.ipv6 && ipv6 ? is_about_flow(error, true) : is_about_flow(error, false);
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
	return aim_at_flow(ipv6) || aim_at_client(error, features.ipv6 && ipv6) ||
	       aim_at_upstream(error, features.ipv6 && ipv6);
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

static __always_inline bool store_error4(struct __sk_buff *skb, const struct error *error)
{
	const struct quoted4 *quoted = &error->v4;

	return !bpf_skb_store_bytes(skb, sizeof(struct ethhdr), &quoted->ip, sizeof(quoted->ip),
				    BPF_F_RECOMPUTE_CSUM) &&
	       !bpf_skb_store_bytes(skb, error->icmp_offset, &quoted->icmp,
				    sizeof(quoted->icmp) + sizeof(quoted->inner), BPF_F_RECOMPUTE_CSUM) &&
	       !bpf_skb_store_bytes(skb, error->udp_offset, &quoted->udp, sizeof(quoted->udp),
				    BPF_F_RECOMPUTE_CSUM);
}

static __always_inline bool store_error6(struct __sk_buff *skb, const struct error *error)
{
	const struct quoted6 *quoted = &error->v6;

	return !bpf_skb_store_bytes(skb, sizeof(struct ethhdr), quoted, offsetof(struct quoted6, udp),
				    BPF_F_RECOMPUTE_CSUM) &&
	       !bpf_skb_store_bytes(skb, error->udp_offset, &quoted->udp, sizeof(quoted->udp),
				    BPF_F_RECOMPUTE_CSUM);
}

/* Rewrites an error in place. Returns false on failure. */
__noinline __u32 rewrite_error(struct __sk_buff *skb, __u32 ipv6)
{
	struct error *error = get_error();

	if (!error)
		return false;
	if (features.ipv6 && ipv6) {
		rewrite_error6(error);
		return store_error6(skb, error);
	}
	rewrite_error4(error);
	return store_error4(skb, error);
}

/* Stores in the scratch where an error goes. Returns false if the upstream is gone. */
static __always_inline bool address_error(const struct error *error, struct xmit *xmit)
{
	const struct upstream *upstream = bpf_map_lookup_elem(&upstreams, &error->index);

	if (!upstream)
		return false;
	xmit->upstream = upstream->id;
	xmit->egress_source = EXTRA(flows) && upstream->source == SOURCE_FLOW;
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
	__u32 flags = features.ipv6 && ipv6 ? PKT_F_IPV6 | PKT_F_LATER_FRAGMENT : PKT_F_LATER_FRAGMENT;
	const struct error *error = get_error();
	struct xmit *xmit = get_xmit();
	struct pkt pkt;

	if (!error || !xmit)
		return TC_ACT_SHOT;
	pkt = pkt_of(pkt_pack(flags, 0, error->icmp_offset));
	if ((skb->vlan_present && bpf_skb_vlan_pop(skb)) || !pkt_pull(skb, &pkt) ||
	    !address_error(error, xmit) ||
	    !is_sent(
		    resolve_nexthop(skb, &pkt, total_length(&pkt) + outer_length(xmit, pkt.is_ipv6), xmit)) ||
	    !rewrite_error(skb, ipv6) || !pkt_locate(skb, &pkt))
		return TC_ACT_SHOT;
	copy_macs(pkt.eth, xmit->hop.macs);
	xmit->checksum = checksum_state(skb, &pkt);
	if (is_tunnel(xmit) && (!fill_outer(skb, pkt.packed) || !push_outer(skb, ipv6)))
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
