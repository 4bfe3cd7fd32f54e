// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The packet's way: parse, match, choose, send, count. */
#include "udplb.h"
#include "parse.h"
#include "siphash.h"
#include "match.h"
#include "rewrite.h"
#include "ipfrag.h"
#include "pmtu.h"
#include "lease.h"
#include "nexthop.h"
#include "trace.h"
#include "count.h"
#include "lb.h"
#include "redirect.h"
#include "vlan.h"
#include "fragmentation.h"
#include "recirculate.h"
#include "xmit.h"
#include "icmp.h"
#include "admit.h"
#include "deliver.h"
#include "slowpath.h"
#include "pmtu_discovery.h"

/* A whole datagram of a rule, in an Ethernet frame without tags. */
static __always_inline int process(struct __sk_buff *skb, __u32 layout, const struct rule *rule,
				   struct packet *packet)
{
	struct selection selection = {};
	enum verdict verdict;

	layout |= trace(skb, rule->id, layout);
	verdict = admit(skb, layout, rule->id, rule->flags);
	if (verdict != VERDICT_FORWARDED)
		return refuse(skb, layout, rule, verdict);
	if (!select_targets(skb, layout, packet, rule, &selection))
		return refuse(skb, layout, rule, VERDICT_CLONE_FAILED);
	return deliver(skb, layout, rule, &selection);
}

static __always_inline int run(struct __sk_buff *skb, const __u32 l2)
{
	const struct rule *rule;
	struct packet packet;
	__u32 layout;
	int action;

	if (skb->cb[CB_MAGIC] == RECIRCULATE_MAGIC && (action = resume_recirculated(skb, l2)) != ACTION_NONE)
		return action;
	switch (parse(skb, l2, &packet)) {
	case PARSED_IPV4:
		rule = match(&packet.ip->saddr, &packet.ip->daddr, packet.udp->dest, false);
		layout = sizeof(struct ethhdr) + packet.ip->ihl * 4;
		break;
	case PARSED_IPV6:
		rule = match(&packet.ip6->saddr, &packet.ip6->daddr, packet.udp->dest, true);
		layout = LAYOUT_IPV6 | (sizeof(struct ethhdr) + sizeof(struct ipv6hdr));
		break;
	case PARSED_ICMP:
		learn_pmtu(skb, l2);
		return TC_ACT_UNSPEC;
	case PARSED_SLOWPATH:
		return l2 ? slowpath_ethernet(skb) : slowpath_l3(skb);
	default:
		return TC_ACT_UNSPEC;
	}
	if (!rule)
		return TC_ACT_UNSPEC;
	if (!l2 || skb->vlan_present)
		return l2 ? slowpath_ethernet(skb) : slowpath_l3(skb);
	if (!is_for_us(skb)) {
		count_verdict(skb, layout, 0, rule->id, VERDICT_NOT_FOR_US);
		return TC_ACT_UNSPEC;
	}
	action = process(skb, layout, rule, &packet);
	return action == ACTION_REFLECT ? bpf_redirect(skb->ifindex, 0) : action;
}

SEC("tc")
int udplb(struct __sk_buff *skb)
{
	return run(skb, sizeof(struct ethhdr));
}

/* For interfaces whose packets have no Ethernet header. */
SEC("tc")
int udplb_l3(struct __sk_buff *skb)
{
	return run(skb, 0);
}

const char LICENSE[] SEC("license") = "Dual BSD/GPL";
