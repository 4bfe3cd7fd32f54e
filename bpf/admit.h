/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Checks matched packets: malformed, martian and looping ones, and those for a local socket, are not
 * forwarded.
 */
#ifndef UDPLB_ADMIT_H
#define UDPLB_ADMIT_H

#define LOOPBACK_IFINDEX 1		  /* include/net/net_namespace.h */
#define SUSPECT_FACTOR 0x9e3779b97f4a7c15 /* golden section */

/* Checks the checksum of an IPv4 header; `sum` is that of its options. */
static __always_inline bool is_ipv4_checksum_valid(const struct iphdr *ip, __u64 sum)
{
	const __u32 *words = (const void *)ip;

	return fold16(sum + words[0] + words[1] + words[2] + words[3] + words[4]) == 0xffff;
}

/* Returns the length in bytes of the options of an IPv4 header. */
static __always_inline __u32 options_length(const struct pkt *pkt)
{
	return pkt_l4_offset(pkt) - sizeof(struct ethhdr) - sizeof(struct iphdr);
}

/* Returns the sum of the options of an IPv4 header. */
__noinline __u64 sum_options(struct __sk_buff *skb, __u32 packed)
{
	struct pkt pkt = pkt_of(packed);
	const __u32 length = options_length(&pkt);
	const void *options;
	__u64 sum = 0;
	__u32 i;

	if (!pkt_locate(skb, &pkt))
		return 0;
	options = pkt.ip + 1;
	for (i = 0; i < MAX_IPOPTLEN && i < length; i += sizeof(__u32)) {
		if (options + i + sizeof(__u32) > data_end(skb))
			break;
		sum += *(const __u32 *)(options + i);
	}
	return sum;
}

/*
 * Checks the checksum of an IPv4 header with options, and the options by the rules of net/ipv4/ip_options.c.
 * A packet with an unfinished source route is not for this host: VERDICT_MARTIAN. Returns enum verdict;
 * VERDICT_FORWARDED: the packet is admitted.
 */
__noinline __u32 check_options(struct __sk_buff *skb, __u32 packed)
{
	struct pkt pkt = pkt_of(packed);
	__u32 length = options_length(&pkt), at, i;
	struct xmit *xmit = get_xmit();
	__u64 sum = sum_options(skb, packed);
	__u64 is_nop, is_route, bytes;
	const __u8 *option;

	if (!xmit || !pkt_locate(skb, &pkt) || !is_ipv4_checksum_valid(pkt.ip, sum))
		return VERDICT_MALFORMED;
	xmit->option_offset = 0;
	xmit->option_malformed = 0;
	xmit->option_unfinished = 0;
	for (i = 0; i < MAX_IPOPTLEN; i++) {
		at = xmit->option_offset & (MAX_IPOPTLEN | 0x1f);
		option = (void *)(pkt.ip + 1) + at;
		if (at >= length || (void *)(option + 3) > data_end(skb) || option[0] == IPOPT_END)
			break;
		/* no branches: the verifier would explore each of them 40 times */
		is_nop = is_equal(option[0], IPOPT_NOP);
		is_route = is_equal(option[0], IPOPT_LSRR) | is_equal(option[0], IPOPT_SSRR);
		bytes = is_nop + (1 - is_nop) * option[1];
		xmit->option_malformed |=
			less_than(bytes, 2 + is_route - is_nop) | less_than(length, at + bytes);
		/* the third byte points at the next address, counted from 1 */
		xmit->option_unfinished |= is_route & less_than(option[2], bytes + 1);
		xmit->option_offset = at + bytes;
	}
	if (xmit->option_malformed)
		return VERDICT_MALFORMED;
	return xmit->option_unfinished ? VERDICT_MARTIAN : VERDICT_FORWARDED;
}

/*
 * Returns true for an IPv4 header with options. Reads the length again: with the value that the offsets are
 * made of, the verifier would explore the rest for both cases.
 */
static __always_inline bool has_options(const struct iphdr *ip)
{
	return (*(const volatile __u8 *)ip & 0xf) > sizeof(*ip) / 4;
}

/* Checks lengths, checksums and options; returns as admit(). */
static __always_inline __u32 check_headers(struct __sk_buff *skb, const struct pkt *pkt, __u32 flags)
{
	__u32 verdict;

	if (!has_valid_lengths(skb->len, pkt))
		return VERDICT_MALFORMED;
	if (pkt->is_ipv6) {
		if (pkt->has_udp && !pkt->udp->check && !(flags & RULE_NO_CHECKSUM))
			return VERDICT_NO_CHECKSUM;
		return VERDICT_FORWARDED;
	}
	if (!has_options(pkt->ip))
		return is_ipv4_checksum_valid(pkt->ip, 0) ? VERDICT_FORWARDED : VERDICT_MALFORMED;
	verdict = check_options(skb, pkt->packed);
	return verdict == VERDICT_MARTIAN && flags & RULE_MARTIANS ? VERDICT_FORWARDED : verdict;
}

/*
 * Returns true for sources that ip_route_input_slow() refuses, and for link-local ones (RFC 3927) outside
 * their link. 0.0.0.0 to 255.255.255.255 is legitimate: a host without an address sends so.
 */
static __always_inline bool is_martian_ipv4(const struct iphdr *ip, bool to_group)
{
	__u32 source = bpf_ntohl(ip->saddr), network = source >> 24;

	if (network == 0)
		return source || ~ip->daddr;
	if (network == 127 || source >> 28 == 0xe || !~source)
		return true;
	return source >> 16 == 0xa9fe && !to_group && bpf_ntohl(ip->daddr) >> 16 != 0xa9fe;
}

/*
 * Returns true for sources that ip6_rcv_core() and ip6_forward() refuse; is_martian_rewrite() checks
 * link-local ones.
 */
static __always_inline bool is_martian_ipv6(const struct ipv6hdr *ip6)
{
	const __be32 *source = ip6->saddr.in6_u.u6_addr32;

	if (!is_unicast_ipv6(source))
		return true;
	return !(source[0] | source[1] | (source[2] ^ bpf_htonl(0xffff))); /* ::ffff:0:0/96 */
}

static __always_inline bool is_martian(const struct pkt *pkt, bool to_group)
{
	if (!pkt->is_ipv6)
		return pkt->ip->saddr == pkt->ip->daddr || is_martian_ipv4(pkt->ip, to_group);
	return is_same_address(pkt->ip6->saddr.in6_u.u6_addr32, pkt->ip6->daddr.in6_u.u6_addr32) ||
	       is_martian_ipv6(pkt->ip6);
}

/* Looks up the source in the Bloom filter `suspects`; src/datapath/gate.rs has the same arithmetic. */
static __always_inline bool is_suspect(const struct pkt *pkt)
{
	const __be32 *source6 = pkt->ip6->saddr.in6_u.u6_addr32;
	__u64 high = 0, low = pkt->ip->saddr, hash;

	if (pkt->is_ipv6) {
		high = (__u64)source6[0] << 32 | source6[1];
		low = (__u64)source6[2] << 32 | source6[3];
	}
	hash = (high * SUSPECT_FACTOR ^ low) * SUSPECT_FACTOR >> (64 - SUSPECT_BITS);
	return gate.suspects[hash / 64] >> hash % 64 & 1;
}

/* Returns true for an address of this host. */
static __always_inline bool is_own_address(const __be32 *address)
{
	const __u32 *kind = bpf_map_lookup_elem(&own, address);

	return kind && *kind == OWN_ADDRESS;
}

/* Checks a packet of a rule whose source may be in `own` or `answers`; returns as admit(). */
__noinline __u32 check_suspect(struct __sk_buff *skb, __u32 packed, __u32 rule_id)
{
	struct pkt pkt = pkt_of(packed);
	struct answer_key answer = {.rule = rule_id};
	const void *source, *destination;
	const struct rule *rule;
	const __u32 *kind;

	if (!pkt_locate(skb, &pkt) || !pkt.has_udp)
		return VERDICT_FORWARDED;
	source = pkt.is_ipv6 ? (void *)&pkt.ip6->saddr : (void *)&pkt.ip->saddr;
	destination = pkt.is_ipv6 ? (void *)&pkt.ip6->daddr : (void *)&pkt.ip->daddr;
	copy_address(answer.address, source, pkt.is_ipv6);
	kind = bpf_map_lookup_elem(&own, answer.address);
	if (kind && skb->ifindex != LOOPBACK_IFINDEX)
		return *kind == OWN_ADDRESS ? VERDICT_LOOP : VERDICT_MARTIAN;
	answer.port = pkt.udp->source;
	/* entries of port 0 are of upstreams at any port of the key */
	if (answer.port && bpf_map_lookup_elem(&answers, &answer))
		return VERDICT_LOOP;
	answer.port = 0;
	if (!bpf_map_lookup_elem(&answers, &answer))
		return VERDICT_FORWARDED;
	/* the upstream got the packet at one of the ports of the rule's key */
	rule = match(source, destination, pkt.udp->source, pkt.is_ipv6);
	return rule && rule->id == rule_id ? VERDICT_LOOP : VERDICT_FORWARDED;
}

/* Checks the source address; returns as admit(). */
static __always_inline __u32 check_source(struct __sk_buff *skb, const struct pkt *pkt, __u32 rule_id,
					  __u32 flags)
{
	bool allow_martians = flags & RULE_MARTIANS;
	__u32 verdict;

	if (!allow_martians && skb->ifindex != LOOPBACK_IFINDEX && is_martian(pkt, flags & RULE_OF_GROUP))
		return VERDICT_MARTIAN;
	if (!is_suspect(pkt))
		return VERDICT_FORWARDED;
	verdict = check_suspect(skb, pkt->packed, rule_id);
	return allow_martians && verdict == VERDICT_MARTIAN ? VERDICT_FORWARDED : verdict;
}

/* Kernel struct (include/net/sock.h). */
struct sock {
	__u8 sk_userlocks : 4;
} __attribute__((preserve_access_index));

#define SOCK_BINDPORT_LOCK 8
#define UDP_CONNECTED 1 /* TCP_ESTABLISHED, the state after connect() */

/* Returns true if bind() named the port, as servers do. Before 6.2 this cannot be read, and is assumed. */
static __always_inline bool is_port_bound(struct bpf_sock *socket)
{
	const struct sock *sock;

	if (!HAS_CAST(bpf_rdonly_cast))
		return true;
	sock = bpf_rdonly_cast(socket, bpf_core_type_id_kernel(struct sock));
	return BPF_CORE_READ_BITFIELD(sock, sk_userlocks) & SOCK_BINDPORT_LOCK;
}

/*
 * Returns true if a socket of this host waits for the packet: it is connected to the sender, or the kernel
 * chose its port, which only those know that it has sent to.
 */
__noinline __u32 has_waiting_socket(struct __sk_buff *skb, __u32 packed)
{
	struct pkt pkt = pkt_of(packed);
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *socket;
	bool waiting;

	if (!pkt_locate(skb, &pkt) || !pkt.has_udp)
		return false;
	if (pkt.is_ipv6) {
		__builtin_memcpy(tuple.ipv6.saddr, &pkt.ip6->saddr, sizeof(tuple.ipv6.saddr));
		__builtin_memcpy(tuple.ipv6.daddr, &pkt.ip6->daddr, sizeof(tuple.ipv6.daddr));
		tuple.ipv6.sport = pkt.udp->source;
		tuple.ipv6.dport = pkt.udp->dest;
		socket = bpf_sk_lookup_udp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	} else {
		tuple.ipv4.saddr = pkt.ip->saddr;
		tuple.ipv4.daddr = pkt.ip->daddr;
		tuple.ipv4.sport = pkt.udp->source;
		tuple.ipv4.dport = pkt.udp->dest;
		socket = bpf_sk_lookup_udp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	if (!socket)
		return false;
	waiting = socket->state == UDP_CONNECTED || !is_port_bound(socket);
	bpf_sk_release(socket);
	return waiting;
}

/* Checks the headers of an upstream's answer; returns as admit(). */
__noinline __u32 admit_answer(struct __sk_buff *skb, __u32 packed, __u32 flags)
{
	struct pkt pkt = pkt_of(packed);
	struct xmit *xmit = get_xmit();

	if (!xmit || !pkt_locate(skb, &pkt))
		return VERDICT_MALFORMED;
	xmit->allow_martians = false;
	return check_headers(skb, &pkt, flags & ~RULE_MARTIANS);
}

/*
 * Checks a matched packet before upstreams are selected. Returns enum verdict; VERDICT_FORWARDED: it is
 * admitted. A global function, because its stack frame would not fit into that of its callers.
 */
__noinline __u32 admit(struct __sk_buff *skb, __u32 packed, __u32 rule_id, __u32 flags)
{
	struct pkt pkt = pkt_of(packed);
	struct xmit *xmit = get_xmit();
	__u32 verdict;

	if (!xmit || !pkt_locate(skb, &pkt))
		return VERDICT_MALFORMED;
	xmit->allow_martians = flags & RULE_MARTIANS;
	verdict = check_headers(skb, &pkt, flags);
	if (verdict != VERDICT_FORWARDED || !pkt.has_udp)
		return verdict;
	if (features.sockets && flags & RULE_SOCKETS && has_waiting_socket(skb, packed))
		return VERDICT_LOCAL_SOCKET;
	return check_source(skb, &pkt, rule_id, flags);
}

#endif
