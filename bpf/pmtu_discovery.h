/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Learns path MTUs from the ICMP errors of routers (RFC 1191, section 3; RFC 8201, section 4). The kernel
 * does so for its own sockets only. The errors continue up the stack.
 */
#ifndef UDPLB_PMTU_DISCOVERY_H
#define UDPLB_PMTU_DISCOVERY_H

/* Rate limit of all reports that are learned from. */
#define REPORTS_PER_SECOND 100
#define REPORTS_BURST 50

/* MTU that an ICMP error reports, and the addresses of the packet that it quotes. */
struct icmp_report {
	__u32 mtu;
	__u32 length;	    /* of the quoted packet */
	__be32 receiver[4]; /* of the error */
	__be32 source[4];
	struct destination_key destination;
};

/* Checks the checksum of an ICMP message; `sum` is that of its pseudo-header. */
static __always_inline bool is_icmp_checksum_valid(struct __sk_buff *skb, __u32 offset, __u32 length,
						   __u64 sum)
{
	return length <= MAX_SUM_BYTES && fold16(sum + sum_bytes(skb, offset, length)) == 0xffff;
}

/* Reads the destination port of the quoted UDP header. */
static __always_inline bool read_ports(struct __sk_buff *skb, __u32 offset, struct icmp_report *report)
{
	__be16 ports[2];

	if (bpf_skb_load_bytes(skb, offset, ports, sizeof(ports)))
		return false;
	report->destination.port = ports[1];
	return true;
}

/* Reads an ICMP "fragmentation needed" error. Returns false for other packets. */
static __always_inline bool read_error4(struct __sk_buff *skb, __u32 offset, struct icmp_report *report)
{
	struct icmp icmp;
	struct iphdr ip;
	__u32 length;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) || ip.ihl < 5 ||
	    ip.frag_off & bpf_htons(IP_OFFSET | IP_MF))
		return false;
	report->receiver[0] = ip.daddr;
	offset += ip.ihl * 4;
	length = bpf_ntohs(ip.tot_len) - ip.ihl * 4;
	if (bpf_skb_load_bytes(skb, offset, &icmp, sizeof(icmp)) || icmp.type != ICMP_DEST_UNREACH ||
	    icmp.code != ICMP_FRAG_NEEDED || !is_icmp_checksum_valid(skb, offset, length, 0))
		return false;
	offset += sizeof(icmp);
	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5 ||
	    ip.protocol != IPPROTO_UDP || ip.frag_off & bpf_htons(IP_OFFSET) ||
	    !(ip.frag_off & bpf_htons(IP_DF)))
		return false;
	report->mtu = bpf_ntohl(icmp.mtu) & 0xffff;
	report->length = bpf_ntohs(ip.tot_len);
	report->source[0] = ip.saddr;
	report->destination.address[0] = ip.daddr;
	return read_ports(skb, offset + ip.ihl * 4, report);
}

/* Reads an ICMPv6 "packet too big" error. Returns false for other packets. */
static __always_inline bool read_error6(struct __sk_buff *skb, __u32 offset, struct icmp_report *report)
{
	struct extension extension;
	struct ipv6hdr ip6;
	struct icmp icmp;
	__u64 sum;

	if (bpf_skb_load_bytes(skb, offset, &ip6, sizeof(ip6)))
		return false;
	__builtin_memcpy(report->receiver, &ip6.daddr, sizeof(report->receiver));
	sum = sum_words(&ip6.saddr, 2 * sizeof(ip6.saddr)) + ip6.payload_len + bpf_htons(IPPROTO_ICMPV6);
	offset += sizeof(ip6);
	if (bpf_skb_load_bytes(skb, offset, &icmp, sizeof(icmp)) || icmp.type != ICMPV6_PKT_TOOBIG ||
	    icmp.code || !is_icmp_checksum_valid(skb, offset, bpf_ntohs(ip6.payload_len), sum))
		return false;
	offset += sizeof(icmp);
	if (bpf_skb_load_bytes(skb, offset, &ip6, sizeof(ip6)) || ip6.version != 6)
		return false;
	report->mtu = bpf_ntohl(icmp.mtu);
	report->length = sizeof(ip6) + bpf_ntohs(ip6.payload_len);
	__builtin_memcpy(report->source, &ip6.saddr, sizeof(report->source));
	__builtin_memcpy(report->destination.address, &ip6.daddr, sizeof(report->destination.address));
	offset += sizeof(ip6);
	if (ip6.nexthdr == NEXTHDR_FRAGMENT) {
		if (bpf_skb_load_bytes(skb, offset, &extension, sizeof(extension)) ||
		    extension.fragment_offset & bpf_htons(0xfff8))
			return false;
		ip6.nexthdr = extension.next;
		offset += sizeof(extension);
	}
	return ip6.nexthdr == IPPROTO_UDP && read_ports(skb, offset, report);
}

/*
 * Returns true if the quoted packet is one that a rule sends: from one of its addresses to one of its
 * upstreams.
 */
static __always_inline bool is_forwarded_flow(struct icmp_report *report, bool ipv6)
{
	const struct destination *destination = bpf_map_lookup_elem(&destinations, &report->destination);
	struct upstream upstream = {};
	__be32 egress[4];
	bool is_vip;

	if (destination) {
		is_vip = bpf_map_lookup_elem(&addresses, report->source);
	} else {
		/* an upstream without a port gets packets at the port that they were sent to */
		is_vip = key_rule(report->source, report->destination.port, ipv6);
		report->destination.port = 0;
		destination = bpf_map_lookup_elem(&destinations, &report->destination);
	}
	if (!destination)
		return false;
	if (destination->sources & 1 << SOURCE_VIP && is_vip)
		return true;
	if (EXTRA(sources) && destination->sources & 1 << SOURCE_FIXED && is_own_address(report->source))
		return true;
	upstream.id = destination->upstream;
	__builtin_memcpy(upstream.address, report->destination.address, sizeof(upstream.address));
	return destination->sources & (1 << SOURCE_EGRESS | 1 << SOURCE_FLOW) &&
	       egress_address(&upstream, egress) && is_same_address(egress, report->source);
}

/* Records the path MTU that an ICMP error reports; `offset` is that of its IP header. */
__noinline __u32 learn_pmtu(struct __sk_buff *skb, __u32 offset)
{
	bool ipv6 = features.ipv6 && skb->protocol == bpf_htons(ETH_P_IPV6);
	struct icmp_report report = {};

	if (skb->pkt_type != PACKET_HOST || features.dry_run ||
	    !(ipv6 ? read_error6(skb, offset, &report) : read_error4(skb, offset, &report)) ||
	    report.length <= report.mtu || !is_same_address(report.receiver, report.source) ||
	    !is_forwarded_flow(&report, ipv6) ||
	    !take_token(BUDGET_REPORTS, REPORTS_BURST, REPORTS_PER_SECOND))
		return 0;
	if (report.mtu < min_pmtu(ipv6))
		report.mtu = min_pmtu(ipv6);
	update_pmtu((const struct key_address *)report.destination.address, report.mtu, PMTU_EXPIRY_SECONDS);
	return 0;
}

#endif
