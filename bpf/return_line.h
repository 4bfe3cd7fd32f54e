/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Return lines: the next hop that this CPU remembers of a client, for answers of flows. As a line, the slow
 * path fills one with the epoch that it read before it decided. The kernel is asked again after a tenth of a
 * second, with the lease too: arpd knows the ways to upstreams alone.
 */
#ifndef UDPLB_RETURN_LINE_H
#define UDPLB_RETURN_LINE_H

/* Kernel structs (include/net/netns), for how the kernel's routing selects a path. */
struct netns_ipv4 {
	__u8 sysctl_fib_multipath_hash_policy;
	unsigned int fib_rules_require_fldissect;
} CO_RE;

struct netns_sysctl_ipv6 {
	__u8 multipath_hash_policy;
} CO_RE;

struct netns_ipv6 {
	struct netns_sysctl_ipv6 sysctl;
	unsigned int fib6_rules_require_fldissect;
} CO_RE;

struct net___routing {
	struct netns_ipv4 ipv4;
	struct netns_ipv6 ipv6;
} CO_RE;

/* Reads a word of struct net; 0 if the kernel is built without it. */
#define NET_WORD(net, field)                                                                                 \
	(bpf_core_field_exists(struct net___routing, field) ? read_word(FIELD_AT(net, net___routing, field)) \
							    : 0)

/*
 * Returns true if the kernel may route two packets with the same addresses by different ways: by policy rules
 * for ports, or over several paths by a hash of ports (policies 1 and 3).
 */
static __always_inline bool routes_by_port(struct __sk_buff *skb, bool ipv6)
{
	const void *packet = HAS_CAST(bpf_cast_to_kern_ctx) ? bpf_cast_to_kern_ctx(skb) : (void *)skb;
	__u64 device = read_pointer(FIELD_AT(packet, sk_buff, dev));
	__u64 net = read_pointer(FIELD_AT(device, net_device, nd_net));

	/* kernel memory cannot be read */
	if (!net)
		return true;
	if (ipv6)
		return NET_WORD(net, ipv6.fib6_rules_require_fldissect) ||
		       NET_WORD(net, ipv6.sysctl.multipath_hash_policy) & 1;
	return NET_WORD(net, ipv4.fib_rules_require_fldissect) ||
	       NET_WORD(net, ipv4.sysctl_fib_multipath_hash_policy) & 1;
}

/* Returns a hash for the lines of packets from a VIP to a client. */
static __always_inline __u64 return_hash(const __be32 *client, const __be32 *vip, const bool ipv6)
{
	const struct sequences *sequences = get_sequences();
	__u64 hash = (__u64)client[0] << 32 | (ipv6 ? client[1] : vip[0]);

	hash = mix(hash ^ (sequences ? sequences->secret[1] : 0));
	return ipv6 ? mix(hash ^ ((__u64)client[2] << 32 | client[3]) ^ vip[3]) : hash;
}

/*
 * Returns the index of the first or the second line of a hash. They are no neighbours: three clients would
 * often have the same two, and take them from each other with each packet.
 */
static __always_inline __u32 return_index(__u64 hash, const bool second)
{
	__u32 index = hash >> (64 - RETURN_BITS);

	return second ? index ^ (hash >> (64 - 2 * RETURN_BITS) | 1) % (1 << RETURN_BITS) : index;
}

static __always_inline struct return_line *return_line_at(__u32 index)
{
	return EXTRA(flows) ? bpf_map_lookup_elem(&returns, &index) : NULL;
}

/*
 * Returns the header fields that the kernel's routing may look at besides the addresses: in IPv4 the type of
 * service, in IPv6 the first word, which is not 0 and begins with another version.
 */
static __always_inline __u32 routed_class(const struct pkt *pkt, const bool ipv6)
{
	return ipv6 ? *(const __u32 *)pkt->ip6 : pkt->ip->tos;
}

/* Returns true for the line of packets like this one, with these new addresses. */
static __always_inline bool is_return_line_of(const struct return_line *line, struct __sk_buff *skb,
					      const struct pkt *pkt, const struct rewrite *rw,
					      const bool ipv6)
{
	return line->class == routed_class(pkt, ipv6) && line->came_by == skb->ifindex &&
	       is_end(line->client, rw->destination, ipv6) && is_end(line->vip, rw->source, ipv6);
}

/*
 * Returns true if a line is in use, and the other one is the better to be replaced. Of two in use it is
 * either: clients find lines of their own after a few packets, wherever that is possible.
 */
static __always_inline bool is_taken(const struct return_line *line, const struct return_line *other)
{
	return is_fresh(line->epoch, line->until) &&
	       (!is_fresh(other->epoch, other->until) || bpf_get_prandom_u32() & 1);
}

/* Remembers a next hop in the line that is the packet's, or else in another. */
static __always_inline struct return_line *write_return_line(struct __sk_buff *skb, const struct pkt *pkt,
							     const struct xmit *xmit, const bool ipv6)
{
	const struct rewrite *rw = &xmit->rewrite;
	__u64 hash = return_hash(rw->destination, rw->source, ipv6);
	struct return_line *line = return_line_at(return_index(hash, false));
	struct return_line *other = return_line_at(return_index(hash, true));

	if (!line || !other)
		return NULL;
	if (!is_return_line_of(line, skb, pkt, rw, ipv6) &&
	    (is_return_line_of(other, skb, pkt, rw, ipv6) || is_taken(line, other)))
		line = other;
	line->ifindex = xmit->hop.ifindex;
	copy_macs(line->macs, xmit->hop.macs);
	line->class = routed_class(pkt, ipv6);
	line->came_by = skb->ifindex;
	copy_address(line->client, rw->destination, ipv6);
	copy_address(line->vip, rw->source, ipv6);
	return line;
}

/*
 * Remembers the next hop in xmit->hop for answers like the packet, an IP packet of `length` bytes, which is
 * rewritten later. Not while anybody traces, and not where packets to a client take several ways.
 */
__noinline __u32 fill_return_line(struct __sk_buff *skb, __u32 packed, __u32 length)
{
	struct pkt pkt = pkt_of(packed);
	struct xmit *xmit = get_xmit();
	struct return_line *line;

	if (!EXTRA(flows) || features.dry_run || !xmit || !xmit->hop.resolved || is_tracing() ||
	    skb->ifindex > 0xffff || !pkt_locate(skb, &pkt) || routes_by_port(skb, pkt.is_ipv6))
		return 0;
	line = features.ipv6 && pkt.is_ipv6 ? write_return_line(skb, &pkt, xmit, true)
					    : write_return_line(skb, &pkt, xmit, false);
	if (!line)
		return 0;
	line->mtu = remembered_mtu(xmit, length, pkt.is_ipv6);
	line->until = bpf_jiffies64() + features.ticks_per_second / LINES_PER_SECOND;
	line->epoch = xmit->epoch;
	return 0;
}

#endif
