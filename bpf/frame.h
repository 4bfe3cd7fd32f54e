/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A matched packet behind an Ethernet header without tags, whatever it came behind; and the way back. */
#ifndef UDPLB_FRAME_H
#define UDPLB_FRAME_H

#define MOST_TAGS 3 /* one in the skb, two in the frame */

struct tags {
	__u32 count;
	struct tag {
		__be16 protocol;
		__u16 control;
	} of[MOST_TAGS];
};

/* The outermost tag, of the skb or else of the frame; false: there is none. */
static __always_inline bool read_tag(struct __sk_buff *skb, struct tag *tag)
{
	const __u32 offset = offsetof(struct ethhdr, h_proto);
	const struct ethhdr *eth = (void *)(long)skb->data;

	if (skb->vlan_present) {
		tag->protocol = skb->vlan_proto;
		tag->control = skb->vlan_tci;
		return true;
	}
	if ((void *)(eth + 1) > data_end(skb) || !is_tag(eth->h_proto) ||
	    bpf_skb_load_bytes(skb, offset, tag, sizeof(*tag)))
		return false;
	tag->control = bpf_ntohs(tag->control);
	return true;
}

static __always_inline bool add_header(struct __sk_buff *skb)
{
	struct ethhdr *eth;

	if (bpf_skb_change_head(skb, sizeof(*eth), 0))
		return false;
	eth = (void *)(long)skb->data;
	if ((void *)(eth + 1) > data_end(skb))
		return false;
	eth->h_proto = skb->protocol;
	return true;
}

/*
 * Takes the tags off, or puts a header on where there is none: nothing above looks at it. False where there
 * is no memory; the tags that came off are in `tags` even then.
 */
static __always_inline bool strip(struct __sk_buff *skb, const __u32 l2, struct tags *tags)
{
	if (!l2)
		return add_header(skb);
#pragma unroll
	for (int i = 0; i < MOST_TAGS; i++) {
		if (!read_tag(skb, &tags->of[i]))
			break;
		if (bpf_skb_vlan_pop(skb))
			return false;
		tags->count = i + 1;
	}
	return true;
}

/* What act() returns where the packet has become an error for its sender. */
#define ACTION_BACK 100

/* Puts the tags on again where the packet goes up or back. */
static __always_inline int dress(struct __sk_buff *skb, const struct tags *tags, int action)
{
	if (action != TC_ACT_UNSPEC && action != ACTION_BACK)
		return action;
#pragma unroll
	for (int i = MOST_TAGS - 1; i >= 0; i--) {
		if (tags->count > (__u32)i &&
		    bpf_skb_vlan_push(skb, tags->of[i].protocol, tags->of[i].control))
			return TC_ACT_SHOT;
	}
	return action == ACTION_BACK ? bpf_redirect(skb->ifindex, 0) : action;
}

#endif
