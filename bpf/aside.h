/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is rare: tags in the frame, extension headers, fragments. By helpers, since nothing lies where it
 * usually does. */
#ifndef UDPLB_ASIDE_H
#define UDPLB_ASIDE_H

#define TAGS_IN_FRAME 2
#define MOST_EXTENSIONS 8
#define HEADERS_LENGTH 512 /* of IPv6 with all that is before UDP */

enum kind {
	KIND_OTHER, /* not ours to judge */
	KIND_DATAGRAM,
	KIND_FIRST, /* fragment */
	KIND_LATER,
	KIND_MALFORMED,
};

/* What there is to know of a packet before it is touched. Offsets are in the frame as it came. */
struct found {
	struct datagram datagram;
	__u32 ip;
	__u32 udp;	/* or a later fragment's data */
	__u32 fragment; /* header, of IPv6 */
	bool ipv6;
	bool foreign;	  /* a later fragment that does not say that it is of UDP */
	struct tags tags; /* that came off */
	struct choice choice;
	struct fragmented entry; /* to be remembered */
};

struct extension {
	__u8 next;
	__u8 length; /* in units of 8 bytes, without the first */
	__be16 fragment_offset;
	__be32 identification;
};

/* Where IP begins behind the frame's tags, and its protocol. */
static __always_inline __u32 skip_tags(struct __sk_buff *skb, __u32 l2, __be16 *protocol)
{
	const struct ethhdr *eth = (void *)(long)skb->data;
	__u32 offset = l2;

	*protocol = skb->protocol;
	if (!l2 || (void *)(eth + 1) > data_end(skb))
		return 0;
	*protocol = eth->h_proto;
#pragma unroll
	for (int i = 0; i < TAGS_IN_FRAME; i++) {
		if (!is_tag(*protocol))
			break;
		if (bpf_skb_load_bytes(skb, offset + 2, protocol, sizeof(*protocol)))
			return 0;
		offset += 4;
	}
	return offset;
}

/* The IP header; without a helper where it usually lies. */
static __always_inline bool read_ipv4(struct __sk_buff *skb, __u32 offset, struct iphdr *ip)
{
	const struct iphdr *usual = (void *)(long)skb->data + sizeof(struct ethhdr);

	if (offset != sizeof(struct ethhdr) || (void *)(usual + 1) > data_end(skb))
		return !bpf_skb_load_bytes(skb, offset, ip, sizeof(*ip));
	*ip = *usual;
	return true;
}

static __always_inline enum kind find_ipv4(struct __sk_buff *skb, struct found *found)
{
	struct iphdr ip;

	if (!read_ipv4(skb, found->ip, &ip) || ip.version != 4 || ip.ihl < 5 || ip.protocol != IPPROTO_UDP)
		return KIND_OTHER;
	found->datagram.source[0] = ip.saddr;
	found->datagram.destination[0] = ip.daddr;
	found->datagram.identification = ip.id;
	found->udp = found->ip + ip.ihl * 4;
	if (ip.frag_off & bpf_htons(IP_OFFSET))
		return KIND_LATER;
	return ip.frag_off & bpf_htons(IP_MF) ? KIND_FIRST : KIND_DATAGRAM;
}

/*
 * Walks the chain from `next` on to the UDP header, or to a fragment header that says there is none. Of
 * what is not addressed here yet (routing, RFC 8200, section 4.4) and of what is no UDP nothing is ours.
 */
static __always_inline enum kind walk(struct __sk_buff *skb, struct found *found, __u8 next)
{
	enum kind kind = KIND_DATAGRAM;
	struct extension extension;
	int i;

	found->udp = found->ip + sizeof(struct ipv6hdr);
	for (i = 0; i <= MOST_EXTENSIONS; i++) {
		if (next == IPPROTO_UDP)
			return kind;
		if (!is_extension(next) || (next == NEXTHDR_HOP && i))
			return KIND_OTHER;
		if (i == MOST_EXTENSIONS ||
		    bpf_skb_load_bytes(skb, found->udp, &extension, sizeof(extension)))
			return KIND_MALFORMED;
		if (next == NEXTHDR_FRAGMENT) {
			if (found->fragment)
				return KIND_MALFORMED;
			found->fragment = found->udp;
			found->datagram.identification = extension.identification;
			if (extension.fragment_offset & bpf_htons(1))
				kind = KIND_FIRST;
			if (extension.fragment_offset & bpf_htons(0xfff8))
				kind = KIND_LATER;
			extension.length = 0;
		} else if (next == NEXTHDR_ROUTING && (extension.fragment_offset & bpf_htons(0xff))) {
			return KIND_OTHER; /* segments are left */
		}
		next = extension.next;
		found->udp += (extension.length + 1) * 8;
		if (found->udp - found->ip > HEADERS_LENGTH || found->udp > skb->len)
			return KIND_MALFORMED;
		if (kind == KIND_LATER) {
			/* only the first one's word counts (RFC 8200, section 4.5) */
			found->foreign = next != IPPROTO_UDP && !is_extension(next);
			return KIND_LATER;
		}
	}
	return KIND_MALFORMED;
}

static __always_inline enum kind find_ipv6(struct __sk_buff *skb, struct found *found)
{
	struct ipv6hdr ip6;

	if (bpf_skb_load_bytes(skb, found->ip, &ip6, sizeof(ip6)) || ip6.version != 6)
		return KIND_OTHER;
	found->ipv6 = true;
	__builtin_memcpy(found->datagram.source, &ip6.saddr, sizeof(found->datagram.source));
	__builtin_memcpy(found->datagram.destination, &ip6.daddr, sizeof(found->datagram.destination));
	return walk(skb, found, ip6.nexthdr);
}

/* As `sendings`. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct found);
} finds SEC(".maps");

static __always_inline struct found *get_found(void)
{
	const __u32 only = 0;

	return bpf_map_lookup_elem(&finds, &only);
}

/* Looks at the packet; what it found is in `finds`. Returns enum kind. */
__noinline __u32 find(struct __sk_buff *skb, __u32 l2)
{
	struct found *found = get_found();
	__be16 protocol;

	if (!found)
		return KIND_OTHER;
	__builtin_memset(found, 0, sizeof(*found));
	found->ip = skip_tags(skb, l2, &protocol);
	if (protocol == bpf_htons(ETH_P_IP))
		return find_ipv4(skb, found);
	if (features.ipv6 && protocol == bpf_htons(ETH_P_IPV6))
		return find_ipv6(skb, found);
	return KIND_OTHER;
}

/* Bytes that are in front of IP besides an Ethernet header; where there is none it is less than nothing. */
static __always_inline __u32 tags_of(const struct found *found)
{
	return found->ip - sizeof(struct ethhdr);
}

static __always_inline __u32 layout_of(const struct found *found, enum kind kind)
{
	__u32 moved = tags_of(found), layout = 0;

	if (kind == KIND_MALFORMED)
		return 0;
	if (found->ipv6)
		layout |= LAYOUT_IPV6;
	if (found->fragment)
		layout |= ((found->fragment - moved) & LAYOUT_FRAGMENT) << LAYOUT_FRAGMENT_SHIFT;
	if (kind == KIND_LATER)
		layout |= LAYOUT_LATER;
	if (kind == KIND_FIRST)
		layout |= LAYOUT_FIRST;
	return layout | ((found->udp - moved) & LAYOUT_UDP);
}

static __always_inline bool is_key_address(const struct found *found)
{
	return bpf_map_lookup_elem(&addresses, found->datagram.destination);
}

/* The rule of a packet that has a UDP header; its port is left in `port`. */
static __always_inline const struct rule *match_found(struct __sk_buff *skb, const struct found *found,
						      __be16 *port)
{
	struct udphdr udp;

	if (bpf_skb_load_bytes(skb, found->udp, &udp, sizeof(udp)))
		return NULL;
	*port = udp.dest;
	return match(found->datagram.source, found->datagram.destination, *port, found->ipv6);
}

/* What was chosen for the first fragment; where a generation has passed, what this one would have chosen. */
static __always_inline void choose_again(const struct rule *rule, const struct fragmented *entry,
					 struct choice *choice)
{
	choice->identification = entry->identification;
	choice->upstream = entry->upstream;
	choice->due = entry->due;
	if (entry->generation == features.generation)
		return;
	choice->upstream = rule->flags & RULE_REPLICATES ? 0 : select(rule, entry->selection);
	if (features.receivers && rule->receivers)
		choice->due = due_receivers(rule->first_receiver, rule->receivers);
}

static __always_inline bool remember_choice(struct found *found, __be16 port, bool matched)
{
	struct fragmented *entry = &found->entry;
	bool remembered;

	entry->generation = features.generation;
	entry->selection = found->choice.key;
	entry->upstream = found->choice.upstream;
	entry->due = found->choice.due;
	entry->port = port;
	entry->matched = matched;
	remembered = remember(&found->datagram, found->ipv6, entry);
	found->choice.identification = entry->identification;
	return remembered;
}

static __always_inline enum verdict verdict_of_nobodys(enum kind kind)
{
	if (kind == KIND_MALFORMED)
		return VERDICT_MALFORMED;
	return features.fragments ? VERDICT_FRAGMENT_EARLY : VERDICT_FRAGMENT;
}

/* What `fragments` of the rule says of one that is not to follow. */
static __always_inline int leave_fragment(struct __sk_buff *skb, __u32 layout, const struct rule *rule)
{
	refuse(skb, layout, rule, VERDICT_FRAGMENT);
	return rule->fragments == FRAGMENTS_DROP ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

/* A packet of a rule, in an Ethernet frame without tags. */
static __always_inline int treat_found(struct __sk_buff *skb, __u32 layout, const struct rule *rule,
				       struct found *found, __be16 port)
{
	bool first = features.fragments && layout & LAYOUT_FIRST;
	bool leave = layout & (LAYOUT_FIRST | LAYOUT_LATER) && rule->fragments != FRAGMENTS_FOLLOW;
	struct choice *choice = &found->choice;
	struct packet packet;

	if (!is_readable(skb, layout))
		pull(skb, LAYOUT_MOST);
	layout |= trace(skb, rule->id, layout);
	if (!locate(skb, layout, &packet) || !well_formed(skb, layout, &packet)) {
		/* nor do those that follow go where another datagram's did */
		if (first)
			remember_choice(found, port, false);
		return refuse(skb, layout, rule, VERDICT_MALFORMED);
	}
	if (!leave && packet.has_udp && !choose(skb, layout, &packet, rule, choice))
		return refuse(skb, layout, rule, VERDICT_CLONE_FAILED);
	if (first && !remember_choice(found, port, true) && !leave)
		return refuse(skb, layout, rule, VERDICT_FRAGMENT_FULL);
	if (leave)
		return leave_fragment(skb, layout, rule);
	return act(skb, layout, rule, choice);
}

#define ROUNDS_PER_TICK 256

/* On this CPU, in this tick. */
struct rounds {
	__u64 tick;
	__u32 left;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct rounds);
} rounds SEC(".maps");

/*
 * Whether a fragment may wait for its first one: some senders send that last. It comes in once more behind
 * all that is queued on this CPU, so many times at most; tc_index counts, which nothing else uses on ingress.
 */
static __always_inline bool may_go_round(struct __sk_buff *skb)
{
	const __u32 only = 0;
	struct rounds *here = bpf_map_lookup_elem(&rounds, &only);
	__u64 now = bpf_jiffies64();

	if (!here || features.asking || skb->tc_index >= features.rounds) {
		skb->tc_index = 0;
		return false;
	}
	if (here->tick != now) {
		here->tick = now;
		here->left = ROUNDS_PER_TICK;
	}
	if (!here->left) {
		skb->tc_index = 0;
		return false;
	}
	here->left--;
	skb->tc_index++;
	return true;
}

/* A fragment whose first one has not been seen. It may be anybody's. */
static __always_inline int wait_for_first(struct __sk_buff *skb, __u32 layout, __u32 tags)
{
	if (!skb->tc_index)
		count_aside(skb, layout, tags, 0, VERDICT_FRAGMENT_EARLY);
	return features.rounds && skb->pkt_type == PACKET_HOST && may_go_round(skb)
		       ? bpf_redirect(skb->ifindex, BPF_F_INGRESS)
		       : TC_ACT_UNSPEC;
}

/* The whole way of such a packet. */
static __always_inline int run_aside(struct __sk_buff *skb, const __u32 l2)
{
	struct found *found = get_found();
	const struct fragmented *entry = NULL;
	const struct rule *rule = NULL;
	__be16 port = 0;
	enum kind kind;
	__u32 layout;
	int action;

	if (!found)
		return TC_ACT_UNSPEC;
	kind = find(skb, l2);
	if (kind == KIND_OTHER)
		return TC_ACT_UNSPEC;
	layout = layout_of(found, kind);
	if (kind == KIND_LATER)
		entry = features.fragments ? recall(&found->datagram, found->ipv6) : NULL;
	if (kind == KIND_MALFORMED || (kind == KIND_LATER && !entry)) {
		if (found->foreign || !is_key_address(found))
			return TC_ACT_UNSPEC;
		if (kind == KIND_LATER && features.fragments)
			return wait_for_first(skb, layout, tags_of(found));
		count_aside(skb, layout, tags_of(found), 0, verdict_of_nobodys(kind));
		return TC_ACT_UNSPEC;
	}
	if (!entry)
		rule = match_found(skb, found, &port);
	else if (entry->matched)
		rule = match(found->datagram.source, found->datagram.destination, entry->port, found->ipv6);
	if (!rule) {
		if (kind == KIND_FIRST && features.fragments && is_key_address(found))
			remember_choice(found, port, false);
		return TC_ACT_UNSPEC;
	}
	if (!is_for_us(skb, rule)) {
		count_aside(skb, layout, tags_of(found), rule->id, VERDICT_NOT_FOR_US);
		return TC_ACT_UNSPEC;
	}
	if (entry)
		choose_again(rule, entry, &found->choice);
	if (strip(skb, l2, &found->tags))
		action = treat_found(skb, layout, rule, found, port);
	else
		action = refuse(skb, layout, rule, VERDICT_CLONE_FAILED);
	return dress(skb, &found->tags, action);
}

#endif
