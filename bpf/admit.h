/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Matched packets that are not the rule's traffic: malformed, martian, looping, or asked for by this host. */
#ifndef UDPLB_ADMIT_H
#define UDPLB_ADMIT_H

#define LOOPBACK_IFINDEX 1 /* include/net/net_namespace.h */

static __always_inline bool is_ipv4_checksum_valid(const struct iphdr *ip, __u64 sum)
{
	const __u32 *words = (const void *)ip;

	return fold16(sum + words[0] + words[1] + words[2] + words[3] + words[4]) == 0xffff;
}

static __always_inline __u32 options_length(__u32 layout)
{
	return (layout & LAYOUT_UDP) - sizeof(struct ethhdr) - sizeof(struct iphdr);
}

/* Returns the sum of the options of an IPv4 header. */
__noinline __u64 sum_options(struct __sk_buff *skb, __u32 layout)
{
	const __u32 length = options_length(layout);
	struct packet packet;
	const void *options;
	__u64 sum = 0;
	__u32 i;

	if (!locate(skb, layout, &packet))
		return 0;
	options = packet.ip + 1;
	for (i = 0; i < MAX_IPOPTLEN && i < length; i += sizeof(__u32)) {
		if (options + i + sizeof(__u32) > data_end(skb))
			break;
		sum += *(const __u32 *)(options + i);
	}
	return sum;
}

/*
 * Checks the sum of an IPv4 header with options, and the options as net/ipv4/ip_options.c does. A source
 * route that is not finished makes the packet somebody else's. Returns enum verdict; VERDICT_FORWARDED: go
 * on.
 */
__noinline __u32 check_options(struct __sk_buff *skb, __u32 layout)
{
	__u32 length = options_length(layout), at, i;
	struct xmit *xmit = get_xmit();
	__u64 sum = sum_options(skb, layout);
	struct packet packet;
	const __u8 *option;
	bool is_route;

	if (!xmit || !locate(skb, layout, &packet) || !is_ipv4_checksum_valid(packet.ip, sum))
		return VERDICT_MALFORMED;
	xmit->option_offset = 0;
	xmit->option_verdict = VERDICT_FORWARDED;
	for (i = 0; i < MAX_IPOPTLEN; i++) {
		at = xmit->option_offset & (MAX_IPOPTLEN | 0x1f);
		option = (void *)(packet.ip + 1) + at;
		if (at >= length || (void *)(option + 3) > data_end(skb) || option[0] == IPOPT_END)
			break;
		if (option[0] == IPOPT_NOP) {
			xmit->option_offset = at + 1;
			continue;
		}
		is_route = option[0] == IPOPT_LSRR || option[0] == IPOPT_SSRR;
		if (option[1] < (is_route ? 3 : 2) || at + option[1] > length)
			return VERDICT_MALFORMED;
		/* the third byte points at the next address, counted from 1 */
		if (is_route && option[2] <= option[1])
			xmit->option_verdict = VERDICT_MARTIAN;
		xmit->option_offset = at + option[1];
	}
	return xmit->option_verdict;
}

/* Reads the length anew: with the one that the layout is made of, the verifier would go on with two layouts.
 */
static __always_inline bool has_options(const struct iphdr *ip)
{
	return (*(const volatile __u8 *)ip & 0xf) > sizeof(*ip) / 4;
}

/* Returns enum verdict; VERDICT_FORWARDED: go on. */
static __always_inline __u32 check_headers(struct __sk_buff *skb, __u32 layout, __u32 flags,
					   const struct packet *packet)
{
	__u32 verdict;

	if (!has_valid_lengths(skb, layout, packet))
		return VERDICT_MALFORMED;
	if (packet->is_ipv6) {
		if (packet->has_udp && !packet->udp->check && !(flags & RULE_NO_CHECKSUM))
			return VERDICT_NO_CHECKSUM;
		return VERDICT_FORWARDED;
	}
	if (!has_options(packet->ip))
		return is_ipv4_checksum_valid(packet->ip, 0) ? VERDICT_FORWARDED : VERDICT_MALFORMED;
	verdict = check_options(skb, layout);
	return verdict == VERDICT_MARTIAN && flags & RULE_MARTIANS ? VERDICT_FORWARDED : verdict;
}

/*
 * Sources that ip_route_input_slow() refuses, and link-local ones (RFC 3927) that left their link. From
 * nobody to everybody is how a host without an address speaks.
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

/* Sources that ip6_rcv_core() and ip6_forward() refuse; next_hop() knows whether a link-local one may leave.
 */
static __always_inline bool is_martian_ipv6(const struct ipv6hdr *ip6)
{
	const __be32 *source = ip6->saddr.in6_u.u6_addr32;

	if (!is_unicast_ipv6(source))
		return true;
	return !(source[0] | source[1] | (source[2] ^ bpf_htonl(0xffff))); /* ::ffff:0:0/96 */
}

static __always_inline bool is_martian(const struct packet *packet, bool to_group)
{
	if (!packet->is_ipv6)
		return packet->ip->saddr == packet->ip->daddr || is_martian_ipv4(packet->ip, to_group);
	return is_same_address(packet->ip6->saddr.in6_u.u6_addr32, packet->ip6->daddr.in6_u.u6_addr32) ||
	       is_martian_ipv6(packet->ip6);
}

/* Looks a source up in `suspects`; src/datapath/environment.rs has the same arithmetic. */
static __always_inline bool is_suspect(const struct packet *packet)
{
	const __be32 *source6 = packet->ip6->saddr.in6_u.u6_addr32;
	__u32 index, hash;
	const __u64 *word;

	if (packet->is_ipv6)
		hash = source6[0] ^ source6[1] ^ source6[2] ^ source6[3];
	else
		hash = packet->ip->saddr;
	hash = bpf_ntohl(hash) * 0x9e3779b1 >> 16;
	index = hash / 64 % SUSPECT_WORDS;
	word = bpf_map_lookup_elem(&suspects, &index);
	return word && *word >> hash % 64 & 1;
}

/* Returns enum verdict for a packet of the rule with that id whose source is in `suspects`. */
__noinline __u32 check_suspect(struct __sk_buff *skb, __u32 layout, __u32 rule_id)
{
	struct answer_key answer = {.rule = rule_id};
	const void *source, *destination;
	const struct rule *rule;
	struct packet packet;
	const __u32 *kind;

	if (!locate(skb, layout, &packet) || !packet.has_udp)
		return VERDICT_FORWARDED;
	source = packet.is_ipv6 ? (void *)&packet.ip6->saddr : (void *)&packet.ip->saddr;
	destination = packet.is_ipv6 ? (void *)&packet.ip6->daddr : (void *)&packet.ip->daddr;
	copy_address(answer.address, source, packet.is_ipv6);
	kind = bpf_map_lookup_elem(&own, answer.address);
	if (kind && skb->ifindex != LOOPBACK_IFINDEX)
		return *kind == OWN_ADDRESS ? VERDICT_LOOP : VERDICT_MARTIAN;
	answer.port = packet.udp->source;
	if (bpf_map_lookup_elem(&answers, &answer))
		return VERDICT_LOOP;
	answer.port = 0;
	if (!bpf_map_lookup_elem(&answers, &answer))
		return VERDICT_FORWARDED;
	/* it was sent to at the ports of the key */
	rule = match(source, destination, packet.udp->source, packet.is_ipv6);
	return rule && rule->id == rule_id ? VERDICT_LOOP : VERDICT_FORWARDED;
}

/* Returns enum verdict; VERDICT_FORWARDED: go on. */
static __always_inline __u32 check_source(struct __sk_buff *skb, __u32 layout, __u32 rule_id, __u32 flags,
					  const struct packet *packet)
{
	bool allow_martians = flags & RULE_MARTIANS;
	__u32 verdict;

	if (!allow_martians && skb->ifindex != LOOPBACK_IFINDEX && is_martian(packet, flags & RULE_OF_GROUP))
		return VERDICT_MARTIAN;
	if (!is_suspect(packet))
		return VERDICT_FORWARDED;
	verdict = check_suspect(skb, layout, rule_id);
	return allow_martians && verdict == VERDICT_MARTIAN ? VERDICT_FORWARDED : verdict;
}

struct sock {
	__u8 sk_userlocks : 4;
} __attribute__((preserve_access_index));

#define SOCK_BINDPORT_LOCK 8
#define UDP_CONNECTED 1 /* TCP_ESTABLISHED, which connect() sets */

extern void *bpf_rdonly_cast(const void *object, __u32 btf_id) __ksym __weak;

/* Returns true where bind() named the port: a server's; before 6.2, which cannot be asked, of any. */
static __always_inline bool is_port_bound(struct bpf_sock *socket)
{
	const struct sock *sock;

	if (!bpf_rdonly_cast)
		return true;
	sock = bpf_rdonly_cast(socket, bpf_core_type_id_kernel(struct sock));
	return BPF_CORE_READ_BITFIELD(sock, sk_userlocks) & SOCK_BINDPORT_LOCK;
}

/*
 * Returns whether a socket of this host waits for the packet: one that is connected to its sender, or whose
 * port the kernel chose, which nobody knows but those that it has sent to.
 */
__noinline __u32 has_waiting_socket(struct __sk_buff *skb, __u32 layout)
{
	struct bpf_sock_tuple tuple = {};
	struct packet packet;
	struct bpf_sock *socket;
	bool asked;

	if (!locate(skb, layout, &packet) || !packet.has_udp)
		return false;
	if (packet.is_ipv6) {
		__builtin_memcpy(tuple.ipv6.saddr, &packet.ip6->saddr, sizeof(tuple.ipv6.saddr));
		__builtin_memcpy(tuple.ipv6.daddr, &packet.ip6->daddr, sizeof(tuple.ipv6.daddr));
		tuple.ipv6.sport = packet.udp->source;
		tuple.ipv6.dport = packet.udp->dest;
		socket = bpf_sk_lookup_udp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	} else {
		tuple.ipv4.saddr = packet.ip->saddr;
		tuple.ipv4.daddr = packet.ip->daddr;
		tuple.ipv4.sport = packet.udp->source;
		tuple.ipv4.dport = packet.udp->dest;
		socket = bpf_sk_lookup_udp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	if (!socket)
		return false;
	asked = socket->state == UDP_CONNECTED || !is_port_bound(socket);
	bpf_sk_release(socket);
	return asked;
}

/*
 * Returns what a matched packet ends as before anything is selected, enum verdict; VERDICT_FORWARDED: go on.
 * Out of line for its stack.
 */
__noinline __u32 admit(struct __sk_buff *skb, __u32 layout, __u32 rule_id, __u32 flags)
{
	struct xmit *xmit = get_xmit();
	struct packet packet;
	__u32 verdict;

	if (!xmit || !locate(skb, layout, &packet))
		return VERDICT_MALFORMED;
	xmit->allow_martians = flags & RULE_MARTIANS;
	verdict = check_headers(skb, layout, flags, &packet);
	if (verdict != VERDICT_FORWARDED || !packet.has_udp)
		return verdict;
	if (features.sockets && flags & RULE_SOCKETS && has_waiting_socket(skb, layout))
		return VERDICT_LOCAL_SOCKET;
	return check_source(skb, layout, rule_id, flags, &packet);
}

#endif
