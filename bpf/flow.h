/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Flows: which client and which port of this host belong together, for rules whose upstreams answer to this
 * host. One record serves both directions, and a hint for each port leads answers to it: a hint is believed
 * only where the flow agrees. Nothing is deleted: what has expired is free.
 *
 * A writer makes the version odd under the bucket's lock, writes, and makes it even again. A reader remembers
 * number and version of the flow that it has found in a handle, and reads the flow by it later: what has
 * changed since is not used.
 *
 * src/desired/flow_copy.rs repeats hashes and places, and src/desired/flows.rs the times.
 */
#ifndef UDPLB_FLOW_H
#define UDPLB_FLOW_H

#define FLOW_TRIES 4
#define PORT_TRIES 16
#define FLOW_GRACE_SECONDS 2	 /* from the end of a flow until another takes its place */
#define FLOW_ASSURE_SECONDS 2	 /* age of a flow whose client speaks again after an answer */
#define FLOW_WRITING FLOW_STATES /* state in the bucket of a flow whose version is odd */

/* Packet whose flow is looked for, and the new flow. In a map, for the stack. */
struct flow_scratch {
	__be32 from[4];
	__be32 to[4];
	__be16 from_port;
	__be16 to_port;
	__be16 server_port;
	__be16 port;
	__be32 server[4];
	__be32 egress[4];
	__u64 hash;
	__u64 handle; /* of the flow that was found or made; 0: none */
	__u32 number; /* version and rank of the flow that the new one replaces */
	__u32 version;
	__u32 rank;
	__u32 place;	    /* of the new flow's port */
	__u32 answers_left; /* of the flow that an answer belongs to */
	/* of rank_bucket(); volatile: else the verifier explores the rest for each value */
	volatile __u64 best;
	struct bpf_sock_tuple tuple;
};

/* Per CPU, see xmit_scratch. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct flow_scratch);
} flow_scratch SEC(".maps");

/* Without flows NULL: before 6.8 the kernel verifies also those global functions that nothing calls. */
static __always_inline struct flow_scratch *get_flow_scratch(void)
{
	const __u32 only = 0;

	return EXTRA(flows) ? bpf_map_lookup_elem(&flow_scratch, &only) : NULL;
}

/* Returns the time in beats. They go round after years. */
static __always_inline __u32 beats(void)
{
	return bpf_jiffies64() >> flow_settings.beat_shift;
}

/* Returns the time since in beats. Another CPU may have stored a later time than this one has read. */
static __always_inline __u32 beats_since(__u32 since, __u32 now)
{
	__s32 age = now - since;

	return age > 0 ? age : 0;
}

static __always_inline bool is_flow_state(__u32 state)
{
	return state > FLOW_FREE && state < FLOW_STATES;
}

/* Returns after how many beats flows in a state expire. */
static __always_inline __u32 timeout_of(__u32 state)
{
	barrier_var(state); /* else the compiler leaves out what older verifiers need to see */
	return flow_settings.timeouts[state & 3];
}

/* Returns true until a flow has expired, and for `grace` beats more. */
static __always_inline bool is_alive(__u32 state, __u32 touched, __u32 now, __u32 grace)
{
	return is_flow_state(state) && beats_since(touched, now) <= timeout_of(state) + grace;
}

static __always_inline struct flow_bucket *bucket_at(__u32 index, const bool ipv6)
{
	if (!EXTRA(flows))
		return NULL;
	return ipv6 ? bpf_map_lookup_elem(&flows6, &index) : bpf_map_lookup_elem(&flows, &index);
}

static __always_inline struct flow *flow_in(struct flow_bucket *bucket, __u32 way, const bool ipv6)
{
	return ipv6 ? &((struct flow_bucket6 *)bucket)->flows[way].flow : &bucket->flows[way].flow;
}

/* Numbers of flows begin with 1. */
static __always_inline __u32 bucket_of(__u32 number)
{
	return (number - 1) / FLOW_WAYS;
}

static __always_inline __u32 way_of(__u32 number)
{
	return (number - 1) % FLOW_WAYS;
}

static __always_inline struct flow *flow_at(__u32 number, const bool ipv6)
{
	struct flow_bucket *bucket = bucket_at(bucket_of(number), ipv6);

	return bucket ? flow_in(bucket, way_of(number), ipv6) : NULL;
}

static __always_inline const __be32 *end_address(const struct flow *flow, const enum flow_end end,
						 const bool ipv6)
{
	return ipv6 ? ((const struct flow6 *)flow)->addresses[end]
		    : &((const struct flow4 *)flow)->addresses[end];
}

/* Reads a version from memory each time, and nothing before or after its turn. */
static __always_inline __u32 version_of(const struct flow *flow)
{
	__u32 version;

	barrier();
	version = *(const volatile __u32 *)&flow->version;
	barrier();
	return version;
}

static __always_inline __u64 flow_handle(__u32 number, __u32 version)
{
	return (__u64)version << 32 | number;
}

static __always_inline __u64 hash_ends(const __be32 *one, const __be32 *other, __u32 ports, const bool ipv6)
{
	const struct sequences *sequences = get_sequences();
	__u64 hash = sequences ? sequences->secret[1] : 0;
	int word;

#pragma unroll
	for (word = 0; word < (ipv6 ? 4 : 1); word++)
		hash = mix(hash ^ ((__u64)one[word] << 32 | other[word]));
	return mix(hash ^ ports);
}

/* Returns a word of which the first byte in memory is the lowest one. */
static __always_inline __u64 le64(__u64 word)
{
	return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? word : __builtin_bswap64(word);
}

static __always_inline bool is_end(const __be32 *one, const __be32 *other, const bool ipv6)
{
	return ipv6 ? is_same_address(one, other) : one[0] == other[0];
}

/* Bits of tags and states, all of a bucket at once. */
#define EACH_TAG 0x0001000100010001ULL
#define EACH_STATE 0x0101010101010101ULL

static __always_inline __u16 tag_of(__u64 hash)
{
	return hash >> 16;
}

/* Returns the tag of a hash in all places of a word. */
static __always_inline __u64 each_tag(__u64 hash)
{
	return tag_of(hash) * EACH_TAG;
}

/*
 * Returns the way that a new flow gets if it is free: a CPU that guesses it reads the flow while the bucket's
 * tags are on their way.
 */
static __always_inline __u32 way_of_hash(__u64 hash)
{
	return hash % FLOW_WAYS;
}

/* Returns the lowest bit of each tag in a word that is zero. */
static __always_inline __u64 zero_tags(__u64 word)
{
	return ~(((word & 0x7fff * EACH_TAG) + 0x7fff * EACH_TAG) | word) >> 15 & EACH_TAG;
}

/* Returns true if a flow in the bucket has the tag of a hash. */
static __always_inline bool has_tag(const struct flow_bucket *bucket, __u64 hash)
{
	const __u64 *tags = (const void *)bucket->tags, tag = each_tag(hash);

	return zero_tags(tags[0] ^ tag) | zero_tags(tags[1] ^ tag);
}

/* Maps 32 bits of a hash to a number below `count`. */
static __always_inline __u32 scale(__u32 hash, __u32 count)
{
	return (__u64)hash * count >> 32;
}

/* Stores addresses and ports of the packet whose flow is looked for. */
static __always_inline void describe_packet(struct flow_scratch *packet, const void *source,
					    const void *destination, __be16 from_port, __be16 to_port,
					    bool ipv6)
{
	copy_address(packet->from, source, ipv6);
	copy_address(packet->to, destination, ipv6);
	packet->from_port = from_port;
	packet->to_port = to_port;
}

static __always_inline __u32 find_in_bucket(__u32 index, const bool ipv6)
{
	const struct flow_scratch *packet = get_flow_scratch();
	struct flow_bucket *bucket = bucket_at(index, ipv6);
	__u32 now = beats(), way;
	const struct flow *flow;

	if (!packet || !bucket)
		return 0;
	for (way = 0; way < FLOW_WAYS; way++) {
		flow = flow_in(bucket, way, ipv6);
		if (bucket->tags[way] == tag_of(packet->hash) &&
		    is_alive(bucket->states[way], bucket->touched[way], now, 0) &&
		    flow->ports[FLOW_CLIENT] == packet->from_port &&
		    flow->ports[FLOW_VIP] == packet->to_port &&
		    is_end(end_address(flow, FLOW_CLIENT, ipv6), packet->from, ipv6) &&
		    is_end(end_address(flow, FLOW_VIP, ipv6), packet->to, ipv6))
			return index * FLOW_WAYS + way + 1;
	}
	return 0;
}

/* Returns the number of the flow of a client's packet in a bucket; 0: none. Global functions: a loop each. */
__noinline __u32 find_in_bucket4(__u32 index)
{
	return find_in_bucket(index, false);
}

__noinline __u32 find_in_bucket6(__u32 index)
{
	return features.ipv6 ? find_in_bucket(index, true) : 0;
}

/* Returns the first or the second bucket of a packet's flow. */
static __always_inline __u32 first_bucket(const struct flow_scratch *packet)
{
	return scale(packet->hash >> 32, flow_settings.buckets);
}

static __always_inline __u32 second_bucket(const struct flow_scratch *packet)
{
	return scale(mix(packet->hash), flow_settings.buckets);
}

static __always_inline __u32 find_in(__u32 index, __u64 hash, const bool ipv6)
{
	const struct flow_bucket *bucket = bucket_at(index, ipv6);

	if (!bucket || !has_tag(bucket, hash))
		return 0;
	return ipv6 ? find_in_bucket6(index) : find_in_bucket4(index);
}

static __always_inline __u32 find_flow(struct flow_scratch *packet, const bool ipv6)
{
	__u64 hash =
		hash_ends(packet->from, packet->to, (__u32)packet->from_port << 16 | packet->to_port, ipv6);
	__u32 number;

	packet->hash = hash;
	number = find_in(first_bucket(packet), hash, ipv6);
	return number ?: find_in(second_bucket(packet), hash, ipv6);
}

/* Writes that a packet of a flow has come, seldom: all flows of a bucket share a cache line. */
static __always_inline void touch_flow(struct flow_bucket *bucket, __u32 way, struct flow *flow, __u32 now)
{
	if (flow->touched == now)
		return;
	flow->touched = now;
	bucket->touched[way] = now;
}

/* Changes the state of the flow of a handle, if it is still that flow. */
static __always_inline void set_flow_state(struct flow_bucket *bucket, __u32 way, struct flow *flow,
					   __u32 version, __u32 state)
{
	bpf_spin_lock(&bucket->lock);
	if (flow->version == version) {
		bucket->states[way] = state;
		flow->state = state;
	}
	bpf_spin_unlock(&bucket->lock);
}

/* Returns true for a flow whose upstream answers to this host. */
static __always_inline bool has_port(const struct flow *flow)
{
	return flow->ports[FLOW_EGRESS];
}

/* Returns true if a flow is one of a rule with these flags, which may have had others when it was made. */
static __always_inline bool is_flow_for(const struct flow *flow, __u32 flags)
{
	return has_port(flow) != !!(flags & RULE_STICKY);
}

/* Returns true if an upstream is the one that the flow goes to. */
static __always_inline bool is_server(const struct flow *flow, const struct upstream *upstream,
				      const bool ipv6)
{
	return is_end(end_address(flow, FLOW_SERVER, ipv6), upstream->address, ipv6) &&
	       flow->ports[FLOW_SERVER] == (upstream->port ?: flow->ports[FLOW_VIP]);
}

/*
 * Returns the upstream of a flow and stores its index; NULL if the generation does not have it. Generations
 * may run at once, and ids are reissued: nothing is believed that the upstream does not confirm.
 */
static __always_inline const struct upstream *flow_upstream(struct flow *flow, __u32 *index, const bool ipv6)
{
	const struct upstream *upstream;
	__u32 id = flow->upstream;
	const __u32 *found;

	*index = flow->index;
	upstream = bpf_map_lookup_elem(&upstreams, index);
	if (!upstream || upstream->id != id) {
		found = bpf_map_lookup_elem(&indexes, &id);
		if (!found)
			return NULL;
		*index = *found;
		upstream = bpf_map_lookup_elem(&upstreams, index);
		if (!upstream)
			return NULL;
		if (!features.dry_run)
			flow->index = *index;
	}
	return is_server(flow, upstream, ipv6) ? upstream : NULL;
}

/*
 * Returns true if a flow goes on with its upstream, at `index`; `first`, `count` and `flags` are those of its
 * rule.
 */
static __always_inline bool keeps_upstream(struct flow *flow, __u32 first, __u32 count, __u32 flags,
					   __u32 now, __u32 *index, const bool ipv6)
{
	const struct upstream *upstream = flow_upstream(flow, index, ipv6);

	if (!upstream || *index - first >= count || (flags & RULE_SKIPS_DOWN && is_down(upstream)) ||
	    !is_flow_for(flow, flags))
		return false;
	/* a client cannot hold a flow to an upstream that does not answer by talking */
	return flags & RULE_STICKY || beats_since(flow->chosen, now) <= flow_settings.timeouts[FLOW_NEW];
}

/*
 * Returns true for a flow that is assured when its client speaks again: nobody sees answers to a sticky one.
 */
static __always_inline bool is_assured_now(const struct flow *flow, __u32 now)
{
	return flow->state == (has_port(flow) ? FLOW_ANSWERED : FLOW_NEW) &&
	       beats_since(flow->created, now) > FLOW_ASSURE_SECONDS * flow_settings.second;
}

static __always_inline __u32 flow_of_client(__u32 first, __u32 count, __u32 flags, const bool ipv6)
{
	struct flow_scratch *packet = get_flow_scratch();
	__u32 now = beats(), number, way, version, index;
	struct flow_bucket *bucket;
	struct flow *flow;

	if (!packet)
		return 0;
	packet->handle = 0;
	number = find_flow(packet, ipv6);
	bucket = bucket_at(bucket_of(number), ipv6);
	if (!number || !bucket)
		return 0;
	way = way_of(number);
	flow = flow_in(bucket, way, ipv6);
	version = version_of(flow);
	if (version & 1)
		return 0;
	packet->handle = flow_handle(number, version);
	if (!features.dry_run) {
		touch_flow(bucket, way, flow, now);
		flow->packets++;
		if (is_assured_now(flow, now))
			set_flow_state(bucket, way, flow, version, FLOW_ASSURED);
	}
	return keeps_upstream(flow, first, count, flags, now, &index, ipv6) ? index + 1 : 0;
}

/* Describes a packet behind an Ethernet header without tags. Returns false if it has no UDP header. */
static __always_inline bool describe_pkt(struct __sk_buff *skb, __u32 packed)
{
	struct flow_scratch *packet = get_flow_scratch();
	struct pkt pkt = pkt_of(packed);

	if (!packet || !pkt_locate(skb, &pkt) || !pkt.has_udp)
		return false;
	if (pkt.is_ipv6)
		describe_packet(packet, &pkt.ip6->saddr, &pkt.ip6->daddr, pkt.udp->source, pkt.udp->dest,
				true);
	else
		describe_packet(packet, &pkt.ip->saddr, &pkt.ip->daddr, pkt.udp->source, pkt.udp->dest,
				false);
	return true;
}

/*
 * Returns the index plus one of the upstream that the flow of a client's packet goes on with; 0: one is
 * selected. Stores the flow's handle. `first`, `count` and `flags` are those of the rule.
 */
__noinline __u32 find_client_flow(struct __sk_buff *skb, __u32 packed, __u32 first, __u32 count, __u32 flags)
{
	if (!describe_pkt(skb, packed))
		return 0;
	return features.ipv6 && packed & PKT_F_IPV6 ? flow_of_client(first, count, flags, true)
						    : flow_of_client(first, count, flags, false);
}

/* Returns the place of a hint in `ports`. */
static __always_inline __u32 port_place(const __be32 *server, const __be32 *egress, __be16 server_port,
					__be16 port, const bool ipv6)
{
	__u64 hash = hash_ends(server, egress, (__u32)server_port << 16 | port, ipv6);

	return scale(hash, flow_settings.port_lines * HINTS_PER_LINE);
}

static __always_inline __u32 place_of_flow(const struct flow *flow, const bool ipv6)
{
	return port_place(end_address(flow, FLOW_SERVER, ipv6), end_address(flow, FLOW_EGRESS, ipv6),
			  flow->ports[FLOW_SERVER], flow->ports[FLOW_EGRESS], ipv6);
}

static __always_inline struct port_line *port_line_at(__u32 place, const bool ipv6)
{
	__u32 index = place / HINTS_PER_LINE;

	if (!EXTRA(flows))
		return NULL;
	return ipv6 ? bpf_map_lookup_elem(&ports6, &index) : bpf_map_lookup_elem(&ports, &index);
}

/* Returns the index in its line. Opaque: the compiler would remove the check that the verifier needs. */
static __always_inline __u64 hint_index(__u32 place)
{
	__u64 index = place % HINTS_PER_LINE;

	barrier_var(index);
	return index < HINTS_PER_LINE ? index : 0;
}

static __always_inline __u32 hinted_flow(__u32 hint)
{
	return hint & ((1 << HINT_TIME_SHIFT) - 1);
}

static __always_inline __u32 hint_of(__u32 number, __u32 now)
{
	return number | now << HINT_TIME_SHIFT;
}

/*
 * Returns true for a second after a port was taken or given back: answers to its flow before may be on their
 * way. Another CPU may have stored a later time than `now`. The time goes round: a port that nobody had for
 * long may seem to rest.
 */
static __always_inline bool is_resting(__u32 hint, __u32 now)
{
	__u32 since = hint & ~((1U << HINT_TIME_SHIFT) - 1);
	__u32 age = ((now + flow_settings.second) << HINT_TIME_SHIFT) - since;

	return hint && age >> HINT_TIME_SHIFT <= 2 * flow_settings.second;
}

static __always_inline bool is_hint_valid(__u32 hint, __u32 place, __u32 now, const bool ipv6)
{
	__u32 number = hinted_flow(hint);
	const struct flow *flow = number ? flow_at(number, ipv6) : NULL;

	return flow && is_alive(flow->state, flow->touched, now, FLOW_GRACE_SECONDS * flow_settings.second) &&
	       place_of_flow(flow, ipv6) == place;
}

/* Returns true if answers to a port of the new flow would go to a socket of this host. */
static __always_inline bool is_socket_port(struct __sk_buff *skb, struct flow_scratch *draft, __be16 port,
					   const bool ipv6)
{
	struct bpf_sock_tuple *tuple = &draft->tuple;
	struct bpf_sock *socket;

	if (ipv6) {
		__builtin_memcpy(tuple->ipv6.saddr, draft->server, sizeof(tuple->ipv6.saddr));
		__builtin_memcpy(tuple->ipv6.daddr, draft->egress, sizeof(tuple->ipv6.daddr));
		tuple->ipv6.sport = draft->server_port;
		tuple->ipv6.dport = port;
		socket = bpf_sk_lookup_udp(skb, tuple, sizeof(tuple->ipv6), BPF_F_CURRENT_NETNS, 0);
	} else {
		tuple->ipv4.saddr = draft->server[0];
		tuple->ipv4.daddr = draft->egress[0];
		tuple->ipv4.sport = draft->server_port;
		tuple->ipv4.dport = port;
		socket = bpf_sk_lookup_udp(skb, tuple, sizeof(tuple->ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	if (!socket)
		return false;
	bpf_sk_release(socket);
	return true;
}

/* Lets the port at a place rest, if the flow of that number has it. */
static __always_inline void rest_port(__u32 place, __u32 number, const bool ipv6)
{
	struct port_line *line = port_line_at(place, ipv6);
	__u64 index = hint_index(place);
	__u32 now = beats();

	if (!line)
		return;
	bpf_spin_lock(&line->lock);
	if (hinted_flow(line->hints[index]) == number)
		line->hints[index] = hint_of(0, now);
	bpf_spin_unlock(&line->lock);
}

/* Claims a flow for writing unless it has become another's. Ends it for all readers. */
static __always_inline bool claim_flow(struct flow_bucket *bucket, __u32 way, struct flow *flow,
				       __u32 version)
{
	bool claimed;

	bpf_spin_lock(&bucket->lock);
	claimed = flow->version == version && !(version & 1);
	if (claimed) {
		flow->version = version + 1;
		flow->state = FLOW_FREE;
		bucket->states[way] = FLOW_WRITING;
	}
	bpf_spin_unlock(&bucket->lock);
	return claimed;
}

/* Releases a claimed flow with its new state. */
static __always_inline void release_flow(struct flow_bucket *bucket, __u32 way, struct flow *flow,
					 __u32 state)
{
	__u32 now = beats();

	bpf_spin_lock(&bucket->lock);
	flow->state = state;
	flow->version++;
	bucket->touched[way] = now;
	bucket->states[way] = state;
	bpf_spin_unlock(&bucket->lock);
}

/* Ends the flow of a handle; its port rests unless it has been silent. */
static __always_inline bool end_flow_of(__u64 handle, const bool was_silent, const bool ipv6)
{
	__u32 number = handle, way = way_of(number), place;
	struct flow_bucket *bucket = bucket_at(bucket_of(number), ipv6);
	struct flow *flow;

	if (!bucket)
		return false;
	flow = flow_in(bucket, way, ipv6);
	if (!claim_flow(bucket, way, flow, handle >> 32))
		return false;
	place = place_of_flow(flow, ipv6);
	if (!was_silent)
		rest_port(place, number, ipv6);
	release_flow(bucket, way, flow, FLOW_FREE);
	return true;
}

/* Ends the flow of a handle; its port rests. Returns false if it has become another's. */
__noinline __u32 end_flow(__u64 handle, __u32 ipv6)
{
	return features.ipv6 && ipv6 ? end_flow_of(handle, false, true) : end_flow_of(handle, false, false);
}

/* Ends the flow whose number, version and family are in skb->cb: for `udplb forget`, never attached. */
SEC("tc")
int udplb_end_flow(struct __sk_buff *skb)
{
	return end_flow(flow_handle(skb->cb[0], skb->cb[1]), skb->cb[2]);
}

/* Returns the handle of a flow that is not assured and silent for a second, so that it can be evicted. */
static __always_inline __u64 silent_flow(__u32 number, __u32 now, const bool ipv6)
{
	const struct flow *flow = flow_at(number, ipv6);
	__u32 version;

	if (!flow)
		return 0;
	version = version_of(flow);
	if (flow->state == FLOW_ASSURED || beats_since(flow->touched, now) <= flow_settings.second)
		return 0;
	return flow_handle(number, version);
}

/* Stores one of several egress addresses as that of the new flow. */
static __always_inline void choose_egress(struct flow_scratch *draft, __u32 index, const bool ipv6)
{
	barrier_var(index); /* else the compiler knows the bound, and leaves the mask out */
	index &= MAX_EGRESSES - 1;
	draft->egress[0] = flow_egresses.addresses[ipv6][index][0];
	draft->egress[1] = flow_egresses.addresses[ipv6][index][1];
	draft->egress[2] = flow_egresses.addresses[ipv6][index][2];
	draft->egress[3] = flow_egresses.addresses[ipv6][index][3];
}

static __always_inline bool take_port(struct __sk_buff *skb, __u32 try, const bool ipv6)
{
	struct flow_scratch *draft = get_flow_scratch();
	__u32 place, hint, step, offset, now;
	struct port_line *line;
	__u64 index, silent;
	bool taken = false;
	__be16 port;

	if (!draft)
		return 0;
	/* double hashing: with neighbours, ports in use would form clusters; the ports of all addresses are
	 * one range */
	step = (__u32)(draft->hash >> 8) | 1;
	offset = ((__u32)draft->hash + try % PORT_TRIES * step) %
		 (flow_settings.ports * (flow_egresses.count[ipv6] ?: 1));
	if (flow_egresses.count[ipv6]) {
		choose_egress(draft, offset / flow_settings.ports, ipv6);
		offset %= flow_settings.ports;
	}
	port = bpf_htons(flow_settings.first_port + offset);
	place = port_place(draft->server, draft->egress, draft->server_port, port, ipv6);
	line = port_line_at(place, ipv6);
	if (!line)
		return 0;
	index = hint_index(place);
	hint = *(volatile __u32 *)&line->hints[index];
	now = beats(); /* not before: a port that was just taken would seem to be free for long */
	if (is_resting(hint, now))
		return 0;
	if (is_socket_port(skb, draft, port, ipv6))
		return 0;
	if (is_hint_valid(hint, place, now, ipv6)) {
		silent = try < PORT_TRIES ? 0 : silent_flow(hinted_flow(hint), now, ipv6);
		if (!silent || (!features.dry_run && !end_flow_of(silent, true, ipv6)))
			return 0;
	}
	draft->place = place;
	draft->port = port;
	if (features.dry_run)
		return true;
	bpf_spin_lock(&line->lock);
	if (line->hints[index] == hint) {
		line->hints[index] = hint_of(draft->number, now);
		taken = true;
	}
	bpf_spin_unlock(&line->lock);
	return taken;
}

/*
 * Takes the next port that the new flow may have. Returns false if the port is in use or rests. From
 * PORT_TRIES on, flows that are silent and not assured are ended for it.
 */
__noinline __u32 try_port(struct __sk_buff *skb, __u32 try, __u32 ipv6)
{
	return features.ipv6 && ipv6 ? take_port(skb, try, true) : take_port(skb, try, false);
}

/*
 * Returns the rank of a flow among those that can be spared: higher for older ones, highest for a free place;
 * 0: it cannot.
 */
static __always_inline __u32 rank_of(__u32 state, __u32 touched, __u32 now)
{
	__u32 age = beats_since(touched, now), timeout = timeout_of(state);

	if (state == FLOW_FREE)
		return 1U << 31;
	if (!is_flow_state(state))
		return 0;
	/* between its end and that of the grace nobody touches it */
	if (age > timeout)
		return age > timeout + FLOW_GRACE_SECONDS * flow_settings.second ? 1U << 30 : 0;
	return state == FLOW_ASSURED ? 0 : age + 1;
}

static __always_inline __u64 rank_bucket(__u32 index, const bool ipv6)
{
	const struct flow_bucket *bucket = bucket_at(index, ipv6);
	struct flow_scratch *draft = get_flow_scratch();
	__u32 now = beats(), way;
	__u64 rank;

	if (!bucket || !draft)
		return 0;
	draft->best = 0;
	for (way = 0; way < FLOW_WAYS; way++) {
		rank = (__u64)rank_of(bucket->states[way], bucket->touched[way], now) << 8 | way;
		if (rank > draft->best)
			draft->best = rank;
	}
	return draft->best >> 8 ? draft->best : 0;
}

/* Returns the rank of the flow in a bucket that can be spared best, above its way in 8 bits; 0: none can. */
__noinline __u64 spare_way(__u32 index, __u32 ipv6)
{
	return features.ipv6 && ipv6 ? rank_bucket(index, true) : rank_bucket(index, false);
}

static __always_inline void copy_end(const __be32 *to, const __be32 *from, const bool ipv6)
{
	copy_address((__be32 *)to, from, ipv6);
}

/* Writes a version in its turn, as version_of() reads it. */
static __always_inline void set_version(struct flow *flow, __u32 version)
{
	barrier();
	*(volatile __u32 *)&flow->version = version;
	barrier();
}

/* Writes the new flow into a locked one. */
static __always_inline void write_flow(struct flow *flow, const struct flow_scratch *draft, __u32 upstream,
				       __u32 index, __u32 answers, __u32 now, const bool ipv6)
{
	flow->upstream = upstream;
	flow->index = index;
	flow->created = flow->touched = flow->chosen = now;
	flow->packets = 1;
	flow->answers = 0;
	flow->answers_left = answers;
	flow->ports[FLOW_CLIENT] = draft->from_port;
	flow->ports[FLOW_VIP] = draft->to_port;
	flow->ports[FLOW_SERVER] = draft->server_port;
	flow->ports[FLOW_EGRESS] = draft->port;
	copy_end(end_address(flow, FLOW_CLIENT, ipv6), draft->from, ipv6);
	copy_end(end_address(flow, FLOW_VIP, ipv6), draft->to, ipv6);
	copy_end(end_address(flow, FLOW_SERVER, ipv6), draft->server, ipv6);
	copy_end(end_address(flow, FLOW_EGRESS, ipv6), draft->egress, ipv6);
	flow->state = FLOW_NEW;
}

/*
 * Returns as spare_way() a free way of a bucket, rather that of the hash, ranked by the number of free ones;
 * 0: none is free.
 */
static __always_inline __u64 free_way(__u32 index, __u64 hash, const bool ipv6)
{
	const struct flow_bucket *bucket = bucket_at(index, ipv6);
	__u64 states, free, way = way_of_hash(hash);

	if (!bucket)
		return 0;
	states = le64(*(const __u64 *)bucket->states);
	/* the lowest bit of each byte that is zero */
	free = ~(((states & 0x7f * EACH_STATE) + 0x7f * EACH_STATE) | states) >> 7 & EACH_STATE;
	if (!free)
		return 0;
	if (!(free >> 8 * way & 1)) /* the number of bytes before the first one */
		way = (((free & -free) - 1) & EACH_STATE) * EACH_STATE >> 56;
	return ((1ULL << 31) + (free * EACH_STATE >> 56)) << 8 | way;
}

static __always_inline bool choose_in_buckets(const bool ipv6)
{
	struct flow_scratch *draft = get_flow_scratch();
	const struct flow *flow;
	__u64 one, other;
	__u32 at, second;

	if (!draft)
		return false;
	at = first_bucket(draft);
	second = second_bucket(draft);
	one = free_way(at, draft->hash, ipv6);
	other = free_way(second, draft->hash, ipv6);
	if (!one && !other) {
		one = spare_way(at, ipv6);
		other = spare_way(second, ipv6);
	}
	/* packets look into the first one first: it may fill by half before they have to look further */
	if (other >> 8 > one >> 8 && one >> 8 < (1U << 31) + FLOW_WAYS / 2) {
		at = second;
		one = other;
	}
	draft->number = at * FLOW_WAYS + one % FLOW_WAYS + 1;
	flow = one ? flow_at(draft->number, ipv6) : NULL;
	if (!flow)
		return false;
	draft->version = version_of(flow);
	draft->rank = one >> 8;
	return true;
}

/* Stores the number of the flow that can be spared best, and its version. Returns false if none can. */
__noinline __u32 choose_flow(__u32 ipv6)
{
	return features.ipv6 && ipv6 ? choose_in_buckets(true) : choose_in_buckets(false);
}

/* Ends the flow that the new one replaces, whose port rests. Returns false if another CPU was faster. */
static __always_inline bool evict_flow(struct flow_bucket *bucket, __u32 way, struct flow *flow,
				       const struct flow_scratch *draft, const bool ipv6)
{
	__u32 place;

	if (!claim_flow(bucket, way, flow, draft->version))
		return false;
	place = place_of_flow(flow, ipv6);
	if (place != draft->place)
		rest_port(place, draft->number, ipv6);
	return true;
}

static __always_inline bool store_flow(__u32 index, __u32 answers, const bool ipv6)
{
	const struct upstream *upstream = bpf_map_lookup_elem(&upstreams, &index);
	struct flow_scratch *draft = get_flow_scratch();
	__u32 way, rank, upstream_id, version, now = beats();
	struct flow_bucket *bucket;
	bool was_used, stored;
	struct flow *flow;

	if (!draft || !upstream || !(bucket = bucket_at(bucket_of(draft->number), ipv6)))
		return false;
	way = way_of(draft->number);
	flow = flow_in(bucket, way, ipv6);
	was_used = is_flow_state(bucket->states[way]);
	/* between its choice and the look at its version another CPU may have made a flow there */
	rank = rank_of(bucket->states[way], bucket->touched[way], now);
	if (!rank || rank + FLOW_WAYS < draft->rank ||
	    (was_used && !evict_flow(bucket, way, flow, draft, ipv6)))
		return false;
	upstream_id = upstream->id;
	version = draft->version;
	bpf_spin_lock(&bucket->lock);
	stored = flow->version == version + was_used && !(version & 1);
	if (stored) {
		set_version(flow, version + 1);
		write_flow(flow, draft, upstream_id, index, answers, now, ipv6);
		set_version(flow, version + 2);
		bucket->tags[way] = tag_of(draft->hash);
		bucket->touched[way] = now;
		bucket->states[way] = FLOW_NEW;
	}
	bpf_spin_unlock(&bucket->lock);
	if (stored)
		draft->handle = flow_handle(draft->number, version + 2);
	return stored;
}

/* Writes the new flow in place of the chosen one. Returns false if another CPU was faster. */
__noinline __u32 replace_flow(__u32 index, __u32 answers, __u32 ipv6)
{
	return features.ipv6 && ipv6 ? store_flow(index, answers, true) : store_flow(index, answers, false);
}

/*
 * Takes a port for the new flow, before any flow is evicted for it, which would be for nothing without one.
 * Returns false if there is none.
 */
__noinline __u32 find_port(struct __sk_buff *skb, __u32 ipv6)
{
	__u32 try;

	for (try = 0; try < 2 * PORT_TRIES; try++)
		if (try_port(skb, try, ipv6))
			return true;
	return false;
}

/* Fills in server and egress address of the packet's new flow, whose flow before has ended. */
static __always_inline __u32 draft_flow(__u32 index, __u32 flags, const bool ipv6)
{
	const struct upstream *upstream = bpf_map_lookup_elem(&upstreams, &index);
	struct flow_scratch *draft = get_flow_scratch();
	struct flow *flow;

	if (!draft || !upstream)
		return VERDICT_NO_UPSTREAM;
	flow = draft->handle ? flow_at(draft->handle, ipv6) : NULL;
	if (flow && is_server(flow, upstream, ipv6) && is_flow_for(flow, flags)) {
		if (!features.dry_run) {
			flow->upstream = upstream->id;
			flow->index = index;
			flow->chosen = beats();
		}
		return VERDICT_FORWARDED;
	}
	if (draft->handle && !features.dry_run)
		end_flow(draft->handle, ipv6);
	draft->handle = 0;
	copy_address(draft->server, upstream->address, ipv6);
	draft->server_port = upstream->port ?: draft->to_port;
	if (!(flags & RULE_STICKY)) {
		if (flow_egresses.count[ipv6])
			return VERDICTS;
		return egress_address(upstream, draft->egress) ? VERDICTS : VERDICT_NO_ROUTE;
	}
	__builtin_memset(draft->egress, 0, sizeof(draft->egress));
	draft->port = 0;
	draft->place = ~0U; /* none */
	return VERDICTS;
}

/* Returns FORWARDED if the packet's flow goes on, VERDICTS if one is to be made, or else why there is none.
 */
__noinline __u32 move_flow(__u32 index, __u32 flags, __u32 ipv6)
{
	return features.ipv6 && ipv6 ? draft_flow(index, flags, true) : draft_flow(index, flags, false);
}

/*
 * Gives the packet's flow to the upstream at an index: the flow goes on if it goes there already, else it
 * ends, and a new one is made. `answers` is the number of answers that end it; 0: none do. `flags` are those
 * of the rule. Stores the flow's handle; in a dry run, in which none is made, 0 and its port. Returns enum
 * verdict.
 */
__noinline __u32 assign_flow(struct __sk_buff *skb, __u32 index, __u32 answers, __u32 flags, __u32 ipv6)
{
	__u32 verdict = move_flow(index, flags, ipv6), try;

	if (verdict != VERDICTS)
		return verdict;
	for (try = 0; try < FLOW_TRIES && choose_flow(ipv6); try++) {
		if (!(flags & RULE_STICKY) && !find_port(skb, ipv6))
			break;
		if (features.dry_run || replace_flow(index, answers, ipv6))
			return VERDICT_FORWARDED;
	}
	return VERDICT_NO_FLOW;
}

/* Returns true for a port that flows have. */
static __always_inline bool is_flow_port(__be16 port)
{
	return (__u32)bpf_ntohs(port) - flow_settings.first_port < flow_settings.ports;
}

/* Returns the index of the answers of an upstream, or of those of none. */
static __always_inline __u32 answers_of(const struct upstream *upstream)
{
	return upstream && upstream->linked ? upstream->linked : flow_settings.orphans;
}

/* Notes an answer of a flow. */
static __always_inline void note_answer(struct flow_bucket *bucket, __u32 way, struct flow *flow, __u32 now)
{
	touch_flow(bucket, way, flow, now);
	flow->answers++;
	flow->chosen = now;
	if (flow->answers_left > 1)
		flow->answers_left--;
}

static __always_inline __u32 flow_of_answer(bool is_packet, const bool ipv6)
{
	struct flow_scratch *packet = get_flow_scratch();
	__u32 now = beats(), place, number, version, way, index;
	const struct upstream *upstream;
	struct flow_bucket *bucket;
	struct port_line *line;
	struct flow *flow;

	if (!packet)
		return 0;
	place = port_place(packet->from, packet->to, packet->from_port, packet->to_port, ipv6);
	line = port_line_at(place, ipv6);
	number = line ? hinted_flow(*(volatile __u32 *)&line->hints[hint_index(place)]) : 0;
	bucket = bucket_at(bucket_of(number), ipv6);
	if (!number || !bucket)
		return 0;
	way = way_of(number);
	flow = flow_in(bucket, way, ipv6);
	version = version_of(flow);
	if (version & 1 || flow->ports[FLOW_EGRESS] != packet->to_port ||
	    flow->ports[FLOW_SERVER] != packet->from_port ||
	    !is_end(end_address(flow, FLOW_SERVER, ipv6), packet->from, ipv6) ||
	    !is_end(end_address(flow, FLOW_EGRESS, ipv6), packet->to, ipv6) ||
	    !is_alive(flow->state, flow->touched, now, 0) || version_of(flow) != version)
		return 0;
	packet->handle = flow_handle(number, version);
	packet->answers_left = flow->answers_left;
	if (is_packet && !features.dry_run) {
		note_answer(bucket, way, flow, now);
		if (flow->state == FLOW_NEW)
			set_flow_state(bucket, way, flow, version, FLOW_ANSWERED);
	}
	upstream = flow_upstream(flow, &index, ipv6);
	return answers_of(upstream) + 1;
}

/*
 * Returns the index plus one in `upstreams` of answers like the packet; 0: it belongs to no flow. Stores the
 * flow's handle, and unless it `is_packet`, nothing in the flow.
 */
__noinline __u32 find_answered_flow(__u32 ipv6, __u32 is_packet)
{
	return features.ipv6 && ipv6 ? flow_of_answer(is_packet, true) : flow_of_answer(is_packet, false);
}

static __always_inline __u64 handle_of_client(const bool ipv6)
{
	struct flow_scratch *packet = get_flow_scratch();
	__u32 number = packet ? find_flow(packet, ipv6) : 0, version;
	const struct flow *flow = number ? flow_at(number, ipv6) : NULL;

	if (!flow)
		return 0;
	version = version_of(flow);
	if (version & 1 || flow->ports[FLOW_CLIENT] != packet->from_port ||
	    !is_end(end_address(flow, FLOW_CLIENT, ipv6), packet->from, ipv6))
		return 0;
	return flow_handle(number, version);
}

/* Returns the handle of the flow of the client's packet, and changes nothing in the flow; 0: it has none. */
__noinline __u64 find_asking_flow(__u32 ipv6)
{
	return features.ipv6 && ipv6 ? handle_of_client(true) : handle_of_client(false);
}

static __always_inline void expire(__u64 handle, const bool ipv6)
{
	struct flow_bucket *bucket = bucket_at(bucket_of(handle), ipv6);
	__u32 way = way_of(handle);
	struct flow *flow;

	if (!bucket)
		return;
	flow = flow_in(bucket, way, ipv6);
	if (version_of(flow) == handle >> 32)
		touch_flow(bucket, way, flow, beats() - timeout_of(flow->state) - 1);
}

/*
 * Lets a flow expire now. Packets no longer find it, but by its handle it is found for FLOW_GRACE_SECONDS
 * more, and its port is kept.
 */
__noinline __u32 expire_flow(__u64 handle, __u32 ipv6)
{
	if (features.ipv6 && ipv6)
		expire(handle, true);
	else
		expire(handle, false);
	return 0;
}

static __always_inline __u32 flow_target(__u64 handle, bool is_answer, const bool ipv6)
{
	struct flow *flow = flow_at(handle, ipv6);
	const struct upstream *upstream;
	__u32 index;

	if (!flow || version_of(flow) != handle >> 32)
		return 0;
	upstream = flow_upstream(flow, &index, ipv6);
	if (is_answer)
		return answers_of(upstream) + 1;
	return upstream ? index + 1 : 0;
}

/*
 * Returns the index plus one in `upstreams` of the upstream of a flow, or of its answers; 0 if the flow has
 * ended or the generation does not have the upstream.
 */
__noinline __u32 find_flow_target(__u64 handle, __u32 is_answer, __u32 ipv6)
{
	return features.ipv6 && ipv6 ? flow_target(handle, is_answer, true)
				     : flow_target(handle, is_answer, false);
}

/* Returns the rule of an upstream or of its answers. */
static __always_inline const struct rule *rule_of_upstream(__u32 index)
{
	const struct upstream *upstream = bpf_map_lookup_elem(&upstreams, &index);
	__u32 rule;

	if (!upstream)
		return NULL;
	rule = upstream->rule;
	return bpf_map_lookup_elem(&rules, &rule);
}

/* Returns true if a rule keeps flows. */
static __always_inline bool has_flows(const struct rule *rule)
{
	return EXTRA(flows) && rule->flags & (RULE_FLOWS | RULE_STICKY);
}

/* Fills in the source that the packet's new flow would get, after a dry run of assign_flow(). */
static __always_inline bool fill_drafted_source(struct rewrite *rw)
{
	const struct flow_scratch *draft = get_flow_scratch();

	if (!draft)
		return false;
	__builtin_memcpy(rw->source, draft->egress, sizeof(rw->source));
	rw->source_port = draft->port;
	return true;
}

/* Returns the handle that set_flow() has set. */
static __always_inline __u64 current_flow(void)
{
	const struct xmit *xmit = get_xmit();

	return xmit ? xmit->flow : 0;
}

/* Returns the index plus one in `upstreams` of answers like the packet, and sets its flow; 0: it has none. */
__noinline __u32 find_answered_pkt(struct __sk_buff *skb, __u32 packed)
{
	const struct flow_scratch *packet = get_flow_scratch();
	struct xmit *xmit = get_xmit();
	__u32 target;

	if (!packet || !xmit || !describe_pkt(skb, packed))
		return 0;
	target = find_answered_flow(packed & PKT_F_IPV6, true);
	xmit->flow = packet->handle;
	return target;
}

/* Sets the flow whose headers xmit_upstream() gives the packet. */
static __always_inline void set_flow(__u64 handle)
{
	struct xmit *xmit = get_xmit();

	if (xmit)
		xmit->flow = handle;
}

/*
 * Returns the rule whose flow a packet answers, stores the index in `upstreams` of the answers, and sets the
 * flow; NULL if it answers none.
 */
static __always_inline const struct rule *match_flow(const void *source, const void *destination,
						     __be16 from_port, __be16 to_port, bool ipv6,
						     __u32 *index)
{
	struct flow_scratch *packet = get_flow_scratch();
	__u32 target;

	if (!packet)
		return NULL;
	describe_packet(packet, source, destination, from_port, to_port, ipv6);
	target = find_answered_flow(ipv6, true);
	if (!target)
		return NULL;
	set_flow(packet->handle);
	*index = target - 1;
	return rule_of_upstream(*index);
}

static __always_inline bool rewrite_for_flow(struct xmit *xmit, const bool is_answer, const bool ipv6)
{
	const enum flow_end from = is_answer ? FLOW_VIP : FLOW_EGRESS;
	const enum flow_end to = is_answer ? FLOW_CLIENT : FLOW_SERVER;
	const struct flow *flow = flow_at(xmit->flow, ipv6);
	struct rewrite *rw = &xmit->rewrite;
	__u32 version = xmit->flow >> 32;

	if (!flow || version_of(flow) != version)
		return false;
	__builtin_memset(rw->source, 0, sizeof(rw->source));
	__builtin_memset(rw->destination, 0, sizeof(rw->destination));
	copy_address(rw->source, end_address(flow, from, ipv6), ipv6);
	copy_address(rw->destination, end_address(flow, to, ipv6), ipv6);
	rw->source_port = flow->ports[from];
	rw->port = flow->ports[to];
	return version_of(flow) == version;
}

/*
 * Fills the new headers of a packet of the flow in xmit->flow: to its client for an answer, else to its
 * server. Returns false if the flow has ended meanwhile.
 */
__noinline __u32 fill_flow_rewrite(__u32 is_answer, __u32 ipv6)
{
	struct xmit *xmit = get_xmit();

	if (!xmit || !xmit->flow)
		return false;
	if (features.ipv6 && ipv6)
		return is_answer ? rewrite_for_flow(xmit, true, true) : rewrite_for_flow(xmit, false, true);
	return is_answer ? rewrite_for_flow(xmit, true, false) : rewrite_for_flow(xmit, false, false);
}

#endif
