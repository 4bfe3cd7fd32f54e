/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Looks next hops up in the kernel's neighbour table. bpf_fib_lookup() does so only while forwarding is
 * on; else the table is read as it lies in the kernel's memory (net/core/neighbour.c), which tc programs may
 * do under RCU. What cannot be read counts as unknown.
 */
#ifndef UDPLB_NEIGHBOUR_H
#define UDPLB_NEIGHBOUR_H

#define BY_LAYOUT __attribute__((preserve_access_index))

/* The members of the kernel's structs that lead from a packet to a neighbour. */
struct hlist_node {
	struct hlist_node *next;
} BY_LAYOUT;

struct hlist_head {
	struct hlist_node *first;
} BY_LAYOUT;

typedef struct {
	struct net *net;
} possible_net_t;

struct net_device {
	int ifindex;
	possible_net_t nd_net;
	struct hlist_node index_hlist;
	struct in_device *ip_ptr;
	struct inet6_dev *ip6_ptr;
} BY_LAYOUT;

struct net {
	struct hlist_head *dev_index_head;
} BY_LAYOUT;

struct in_device {
	struct neigh_parms *arp_parms;
} BY_LAYOUT;

struct inet6_dev {
	struct neigh_parms *nd_parms;
} BY_LAYOUT;

struct neigh_parms {
	struct neigh_table *tbl;
} BY_LAYOUT;

struct neigh_table {
	struct neigh_hash_table *nht;
} BY_LAYOUT;

struct neigh_hash_table {
	struct hlist_head *hash_heads; /* from 6.13 on */
	unsigned int hash_shift;
	__u32 hash_rnd[4];
} BY_LAYOUT;

struct neigh_hash_table___before_6_13 {
	struct neighbour **hash_buckets;
} BY_LAYOUT;

struct neighbour {
	struct hlist_node hash; /* from 6.13 on */
	struct net_device *dev;
	__u8 nud_state;
	__u8 primary_key[0];
} BY_LAYOUT;

struct neighbour___before_6_13 {
	struct neighbour *next;
} BY_LAYOUT;

/* Begins with a number as long as a pointer. */
struct rb_node {
	unsigned long __rb_parent_color;
} BY_LAYOUT;

#define DEVICE_BUCKETS 256 /* NETDEV_HASHENTRIES */
#define MOST_IN_BUCKET 16

/* NUD_PERMANENT, NUD_NOARP, NUD_REACHABLE, NUD_PROBE, NUD_STALE, NUD_DELAY. */
#define NUD_VALID 0xde

enum known {
	KNOWN_NOT_READABLE,
	KNOWN_NOT, /* or not to answer */
	KNOWN_VALID,
};

/* Reads a pointer of the kernel's, as a number: 0 where nothing is. */
static __always_inline __u64 read_pointer(const void *address)
{
	__u64 word = 0;

	if (bpf_rdonly_cast)
		return ((struct rb_node *)bpf_rdonly_cast(address, bpf_core_type_id_kernel(struct rb_node)))
			->__rb_parent_color;
	bpf_probe_read_kernel(&word, sizeof(word), address);
	return word;
}

static __always_inline __u32 read_word(const void *address)
{
	__u32 word = 0;

	if (bpf_rdonly_cast)
		return ((struct in_addr *)bpf_rdonly_cast(address, bpf_core_type_id_kernel(struct in_addr)))
			->s_addr;
	bpf_probe_read_kernel(&word, sizeof(word), address);
	return word;
}

#define AT(address, type, field) ((void *)(address) + bpf_core_field_offset(struct type, field))

/* The address of the device with that index, in the network namespace of the packet's; 0: none. */
static __always_inline __u64 find_device(struct __sk_buff *skb, __u32 ifindex)
{
	const void *packet = bpf_cast_to_kern_ctx ? bpf_cast_to_kern_ctx(skb) : (void *)skb;
	__u64 device = read_pointer(AT(packet, sk_buff, dev)), node;
	int i;

	node = read_pointer(AT(read_pointer(AT(device, net_device, nd_net)), net, dev_index_head));
	node = read_pointer((void *)(node + ifindex % DEVICE_BUCKETS * sizeof(struct hlist_head)));
	for (i = 0; node && i < MOST_IN_BUCKET; i++) {
		device = node - bpf_core_field_offset(struct net_device, index_hlist);
		if (read_word(AT(device, net_device, ifindex)) == ifindex)
			return device;
		node = read_pointer((void *)node);
	}
	return 0;
}

/* As arp_hashfn() and ndisc_hashfn() have it. */
static __always_inline __u32 neighbour_hash(__u64 table, __u64 device, const __be32 *address, bool ipv6)
{
	__u32 hash = (address[0] ^ (__u32)(device ^ device >> 32)) *
		     read_word(AT(table, neigh_hash_table, hash_rnd));
	int word;

#pragma unroll
	for (word = 1; ipv6 && word < 4; word++)
		hash += address[word] * read_word(AT(table, neigh_hash_table, hash_rnd) + word * 4);
	return hash >> (32 - read_word(AT(table, neigh_hash_table, hash_shift)));
}

static __always_inline bool is_neighbour(__u64 neighbour, __u64 device, const __be32 *address, bool ipv6)
{
	const void *key = AT(neighbour, neighbour, primary_key);

	return read_pointer(AT(neighbour, neighbour, dev)) == device && read_word(key) == address[0] &&
	       (!ipv6 || (read_word(key + 4) == address[1] && read_word(key + 8) == address[2] &&
			  read_word(key + 12) == address[3]));
}

/* The neighbour table's entries for a device: the first of those that share a bucket with an address. */
static __always_inline __u64 find_table(__u64 device, bool ipv6)
{
	__u64 parms =
		ipv6 ? read_pointer(AT(read_pointer(AT(device, net_device, ip6_ptr)), inet6_dev, nd_parms))
		     : read_pointer(AT(read_pointer(AT(device, net_device, ip_ptr)), in_device, arp_parms));

	return read_pointer(AT(read_pointer(AT(parms, neigh_parms, tbl)), neigh_table, nht));
}

/* Looks the gateway in `sending` up in the kernel's neighbour table. */
static __always_inline enum known is_gateway_known(struct __sk_buff *skb)
{
	bool listed = bpf_core_field_exists(struct neigh_hash_table, hash_heads);
	struct sending *sending = get_sending();
	__u64 device, table, neighbour, next;
	bool ipv6;
	int i;

	if (!sending || !(device = find_device(skb, sending->way.ifindex)))
		return KNOWN_NOT_READABLE;
	ipv6 = sending->way.family == AF_INET6;
	if (!(table = find_table(device, ipv6)))
		return KNOWN_NOT_READABLE;
	neighbour = listed ? read_pointer(AT(table, neigh_hash_table, hash_heads))
			   : read_pointer(AT(table, neigh_hash_table___before_6_13, hash_buckets));
	neighbour += neighbour_hash(table, device, sending->way.gateway, ipv6) * sizeof(void *);
	neighbour = read_pointer((void *)neighbour);
	for (i = 0; neighbour && i < MOST_IN_BUCKET; i++) {
		if (listed)
			neighbour -= bpf_core_field_offset(struct neighbour, hash);
		if (is_neighbour(neighbour, device, sending->way.gateway, ipv6))
			return read_word(AT(neighbour, neighbour, nud_state)) & NUD_VALID ? KNOWN_VALID
											  : KNOWN_NOT;
		next = listed ? read_pointer(AT(neighbour, neighbour, hash))
			      : read_pointer(AT(neighbour, neighbour___before_6_13, next));
		neighbour = next;
	}
	return KNOWN_NOT;
}

#endif
