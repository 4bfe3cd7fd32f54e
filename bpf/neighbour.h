/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Looks up next hops in the kernel's neighbour table. bpf_fib_lookup() does so only while forwarding is
 * enabled. Otherwise the table is read from kernel memory (net/core/neighbour.c), which is safe because tc
 * programs run under RCU. An entry that cannot be read counts as unknown.
 */
#ifndef UDPLB_NEIGHBOUR_H
#define UDPLB_NEIGHBOUR_H

#define CO_RE __attribute__((preserve_access_index))

/* Members of kernel structs on the path from a packet to its neighbour entry. */
struct hlist_node {
	struct hlist_node *next;
} CO_RE;

struct hlist_head {
	struct hlist_node *first;
} CO_RE;

typedef struct {
	struct net *net;
} possible_net_t;

struct net_device {
	int ifindex;
	possible_net_t nd_net;
	struct hlist_node index_hlist;
	struct in_device *ip_ptr;
	struct inet6_dev *ip6_ptr;
} CO_RE;

struct net {
	struct hlist_head *dev_index_head;
} CO_RE;

struct in_device {
	struct neigh_parms *arp_parms;
} CO_RE;

struct inet6_dev {
	struct neigh_parms *nd_parms;
} CO_RE;

struct neigh_parms {
	struct neigh_table *tbl;
} CO_RE;

struct neigh_table {
	struct neigh_hash_table *nht;
} CO_RE;

struct neigh_hash_table {
	struct hlist_head *hash_heads; /* from 6.13 on */
	unsigned int hash_shift;
	__u32 hash_rnd[4];
} CO_RE;

struct neigh_hash_table___before_6_13 {
	struct neighbour **hash_buckets;
} CO_RE;

struct neighbour {
	struct hlist_node hash; /* from 6.13 on */
	struct net_device *dev;
	__u8 nud_state;
	__u8 primary_key[0];
} CO_RE;

struct neighbour___before_6_13 {
	struct neighbour *next;
} CO_RE;

/* A struct that begins with an integer of pointer size, to read one through a cast. */
struct rb_node {
	unsigned long __rb_parent_color;
} CO_RE;

#define DEVICE_BUCKETS 256 /* NETDEV_HASHENTRIES */
#define MAX_BUCKET_ENTRIES 16

/* NUD_PERMANENT, NUD_NOARP, NUD_REACHABLE, NUD_PROBE, NUD_STALE, NUD_DELAY. */
#define NUD_VALID 0xde

enum neighbour_state {
	NEIGHBOUR_UNREADABLE,
	NEIGHBOUR_INVALID, /* unknown to the kernel, or not answering */
	NEIGHBOUR_VALID,
};

/* Reads a pointer from kernel memory; 0 if it cannot be read. */
static __always_inline __u64 read_pointer(const void *address)
{
	__u64 word = 0;

	if (HAS_CAST(bpf_rdonly_cast))
		return ((struct rb_node *)bpf_rdonly_cast(address, bpf_core_type_id_kernel(struct rb_node)))
			->__rb_parent_color;
	bpf_probe_read_kernel(&word, sizeof(word), address);
	return word;
}

/* Reads 32 bits from kernel memory; 0 if they cannot be read. */
static __always_inline __u32 read_word(const void *address)
{
	__u32 word = 0;

	if (HAS_CAST(bpf_rdonly_cast))
		return ((struct in_addr *)bpf_rdonly_cast(address, bpf_core_type_id_kernel(struct in_addr)))
			->s_addr;
	bpf_probe_read_kernel(&word, sizeof(word), address);
	return word;
}

/* Address of a field of a kernel struct. */
#define FIELD_AT(address, type, field) ((void *)(address) + bpf_core_field_offset(struct type, field))

/* Returns the address of the net_device with an index, in the packet's network namespace; 0: none. */
static __always_inline __u64 lookup_device(struct __sk_buff *skb, __u32 ifindex)
{
	const void *packet = HAS_CAST(bpf_cast_to_kern_ctx) ? bpf_cast_to_kern_ctx(skb) : (void *)skb;
	__u64 device = read_pointer(FIELD_AT(packet, sk_buff, dev)), node;
	int i;

	node = read_pointer(
		FIELD_AT(read_pointer(FIELD_AT(device, net_device, nd_net)), net, dev_index_head));
	node = read_pointer((void *)(node + ifindex % DEVICE_BUCKETS * sizeof(struct hlist_head)));
	for (i = 0; node && i < MAX_BUCKET_ENTRIES; i++) {
		device = node - bpf_core_field_offset(struct net_device, index_hlist);
		if (read_word(FIELD_AT(device, net_device, ifindex)) == ifindex)
			return device;
		node = read_pointer((void *)node);
	}
	return 0;
}

/*
 * Returns the bucket of an address, as arp_hashfn() and ndisc_hashfn() compute it. `words` masks all words
 * but the first: 0 for IPv4. Branch-free, else the verifier would explore all that follows for each family.
 */
static __always_inline __u32 neighbour_hash(__u64 table, __u64 device, const __be32 *address, __u32 words)
{
	__u32 hash = (address[0] ^ (__u32)(device ^ device >> 32)) *
		     read_word(FIELD_AT(table, neigh_hash_table, hash_rnd));
	int word;

#pragma unroll
	for (word = 1; word < 4; word++) {
		hash += address[word] * read_word(FIELD_AT(table, neigh_hash_table, hash_rnd) + word * 4) &
			words;
		barrier_var(hash); /* else the compiler spills all words to the stack */
	}
	return hash >> (32 - read_word(FIELD_AT(table, neigh_hash_table, hash_shift)));
}

/* Returns true for the neighbour with an address on a device; `words` as for neighbour_hash(). */
static __always_inline bool is_neighbour(__u64 neighbour, __u64 device, const volatile __be32 *address,
					 __u32 words)
{
	const void *key = FIELD_AT(neighbour, neighbour, primary_key);
	__u32 different = 0;
	int word;

#pragma unroll
	for (word = 3; word > 0; word--) {
		different = (different | (read_word(key + word * 4) ^ address[word])) & words;
		barrier_var(different); /* as above */
	}
	return !(different | (read_word(key) ^ address[0])) &&
	       read_pointer(FIELD_AT(neighbour, neighbour, dev)) == device;
}

/* Returns the address of the hash table of the device's ARP or NDISC entries; 0: none. */
static __always_inline __u64 lookup_table(__u64 device, bool ipv6)
{
	__u64 parms = ipv6 ? read_pointer(FIELD_AT(read_pointer(FIELD_AT(device, net_device, ip6_ptr)),
						   inet6_dev, nd_parms))
			   : read_pointer(FIELD_AT(read_pointer(FIELD_AT(device, net_device, ip_ptr)),
						   in_device, arp_parms));

	return read_pointer(FIELD_AT(read_pointer(FIELD_AT(parms, neigh_parms, tbl)), neigh_table, nht));
}

/*
 * Returns the state of the gateway in xmit->hop in the kernel's neighbour table: enum neighbour_state. A
 * global function, since it has two callers and loops that the verifier unrolls.
 */
__noinline __u32 gateway_state(struct __sk_buff *skb)
{
	bool listed = bpf_core_field_exists(struct neigh_hash_table, hash_heads);
	struct xmit *xmit = get_xmit();
	__u64 device, table, neighbour;
	__u32 words;
	int i;

	if (!xmit || !(device = lookup_device(skb, xmit->hop.ifindex)))
		return NEIGHBOUR_UNREADABLE;
	words = -(__u32)is_equal(xmit->hop.family, AF_INET6);
	if (!(table = lookup_table(device, xmit->hop.family == AF_INET6)))
		return NEIGHBOUR_UNREADABLE;
	neighbour = listed ? read_pointer(FIELD_AT(table, neigh_hash_table, hash_heads))
			   : read_pointer(FIELD_AT(table, neigh_hash_table___before_6_13, hash_buckets));
	neighbour += neighbour_hash(table, device, xmit->hop.gateway, words) * sizeof(void *);
	neighbour = read_pointer((void *)neighbour);
	for (i = 0; neighbour && i < MAX_BUCKET_ENTRIES; i++) {
		if (listed)
			neighbour -= bpf_core_field_offset(struct neighbour, hash);
		if (is_neighbour(neighbour, device, xmit->hop.gateway, words))
			return read_word(FIELD_AT(neighbour, neighbour, nud_state)) & NUD_VALID
				       ? NEIGHBOUR_VALID
				       : NEIGHBOUR_INVALID;
		neighbour = listed ? read_pointer(FIELD_AT(neighbour, neighbour, hash))
				   : read_pointer(FIELD_AT(neighbour, neighbour___before_6_13, next));
	}
	return NEIGHBOUR_INVALID;
}

#endif
