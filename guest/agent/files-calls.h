/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The encoding of the cases of the harness `files`: the only definition. harness-files.c includes
 * it, bridge/fuzz/files_text.py reads it, so each entry is on one line, and a new one goes to the
 * end of its list: the numbers of the others are in people's corpora.
 *
 * A case is a series of records, with FILES_SEPARATOR between them. In a record FILES_ESCAPE
 * stands for the byte after it ^ FILES_ESCAPE_XOR; at the record's end it stands for nothing. An
 * empty record is skipped. The first byte of a record is the call, (byte & 63) % calls, with the
 * thread that makes it between `parallel` and `join`, byte >> 6. Its arguments follow:
 *
 *	kind	bytes	meaning
 *	slot	1	a file descriptor of the case, % FILES_SLOTS
 *	name	1	NAME, % names
 *	number	2	little-endian: itself below FILES_SPECIAL, then SPECIAL, % specials
 *	length	2	little-endian
 *	fill	1	written bytes: fill, fill + 1, ...
 *	open	2	little-endian: bits 0-1 r, w, rw, rw; then a bit for each OPEN_FLAG
 *	data	rest	bytes to write
 *	others	1	an entry of their list, % entries
 *
 * Missing bytes are 0. So each byte string is a case, a change in a record changes that call only,
 * and a byte more or less moves no other record.
 */
#ifndef KCOV_BRIDGE_AGENT_FILES_CALLS_H
#define KCOV_BRIDGE_AGENT_FILES_CALLS_H

#define FILES_SEPARATOR 0x0a
#define FILES_ESCAPE 0x1b
#define FILES_ESCAPE_XOR 0x40
#define FILES_SLOTS 8
#define FILES_SPECIAL 0xc000
#define FILES_THREADS 4
#define FILES_MOST_CALLS 256 /* of a case; more are not made */
#define FILES_MOST_DATA 4096 /* bytes of an argument `data` */

/* CALL(name, kinds of its arguments) */
#define FILES_CALLS                                                                                \
	CALL(open, "slot name open mode")                                                          \
	CALL(read, "slot length")                                                                  \
	CALL(pread, "slot length number")                                                          \
	CALL(write, "slot length fill")                                                            \
	CALL(pwrite, "slot length fill number")                                                    \
	CALL(put, "slot data")                                                                     \
	CALL(lseek, "slot number whence")                                                          \
	CALL(truncate, "name number")                                                              \
	CALL(ftruncate, "slot number")                                                             \
	CALL(rename, "name name rename")                                                           \
	CALL(link, "name name")                                                                    \
	CALL(symlink, "name name")                                                                 \
	CALL(readlink, "name")                                                                     \
	CALL(unlink, "name")                                                                       \
	CALL(mkdir, "name mode")                                                                   \
	CALL(rmdir, "name")                                                                        \
	CALL(list, "name")                                                                         \
	CALL(getdents, "slot")                                                                     \
	CALL(stat, "name")                                                                         \
	CALL(lstat, "name")                                                                        \
	CALL(fstat, "slot")                                                                        \
	CALL(statfs, "name")                                                                       \
	CALL(access, "name mode")                                                                  \
	CALL(chmod, "name mode")                                                                   \
	CALL(fchmod, "slot mode")                                                                  \
	CALL(chown, "name owner")                                                                  \
	CALL(utimens, "name time time")                                                            \
	CALL(futimens, "slot time time")                                                           \
	CALL(setxattr, "name xattr length fill xflag")                                             \
	CALL(getxattr, "name xattr length")                                                        \
	CALL(listxattr, "name length")                                                             \
	CALL(removexattr, "name xattr")                                                            \
	CALL(mread, "slot number length")                                                          \
	CALL(mwrite, "slot number length fill")                                                    \
	CALL(msync, "slot number length fill")                                                     \
	CALL(fsync, "slot")                                                                        \
	CALL(fdatasync, "slot")                                                                    \
	CALL(syncfs, "slot")                                                                       \
	CALL(fallocate, "slot fallocate number length")                                            \
	CALL(copy, "slot slot length")                                                             \
	CALL(sendfile, "slot slot length")                                                         \
	CALL(advise, "slot advice number length")                                                  \
	CALL(flock, "slot flock")                                                                  \
	CALL(setlk, "slot lock number length")                                                     \
	CALL(getlk, "slot lock number length")                                                     \
	CALL(dup, "slot slot")                                                                     \
	CALL(close, "slot")                                                                        \
	CALL(parallel, "")                                                                         \
	CALL(join, "")

/* NAME(how it is written, the path). None leaves the directory: no "..", no "/" at the front. */
#define FILES_NAMES                                                                                \
	NAME("a", "a")                                                                             \
	NAME("b", "b")                                                                             \
	NAME("c", "c")                                                                             \
	NAME("d", "d")                                                                             \
	NAME("e", "e")                                                                             \
	NAME("d/a", "d/a")                                                                         \
	NAME("d/b", "d/b")                                                                         \
	NAME("d/e", "d/e")                                                                         \
	NAME("d/e/a", "d/e/a")                                                                     \
	NAME("e/a", "e/a")                                                                         \
	NAME(".", ".")                                                                             \
	NAME("d/", "d/")                                                                           \
	NAME("a/", "a/")                                                                           \
	NAME("blank", "with blank")                                                                \
	NAME("umlaut", "\303\244\303\266")                                                         \
	NAME("bytes", "\377\001\\")                                                                \
	NAME("long", FILES_255)                                                                    \
	NAME("longer", FILES_255 "x")                                                              \
	NAME("d/long", "d/" FILES_255)                                                             \
	NAME("empty", "")

#define FILES_51 "123456789.123456789.123456789.123456789.123456789.1"
#define FILES_255 FILES_51 FILES_51 FILES_51 FILES_51 FILES_51

/* SPECIAL(value): numbers that code trips over. -1 is the largest one as an offset's bits. */
#define FILES_SPECIALS                                                                             \
	SPECIAL(65535)                                                                             \
	SPECIAL(65536)                                                                             \
	SPECIAL(65537)                                                                             \
	SPECIAL(1048575)                                                                           \
	SPECIAL(1048576)                                                                           \
	SPECIAL(2147483647)                                                                        \
	SPECIAL(2147483648)                                                                        \
	SPECIAL(4294967295)                                                                        \
	SPECIAL(4294967296)                                                                        \
	SPECIAL(1099511627776)                                                                     \
	SPECIAL(9223372036854771712)                                                               \
	SPECIAL(9223372036854775807)                                                               \
	SPECIAL(-1)                                                                                \
	SPECIAL(-4096)

/* OPEN_FLAG(how it is written, flag); at most 14. */
#define FILES_OPEN_FLAGS                                                                           \
	OPEN_FLAG("creat", O_CREAT)                                                                \
	OPEN_FLAG("excl", O_EXCL)                                                                  \
	OPEN_FLAG("trunc", O_TRUNC)                                                                \
	OPEN_FLAG("append", O_APPEND)                                                              \
	OPEN_FLAG("directory", O_DIRECTORY)                                                        \
	OPEN_FLAG("nofollow", O_NOFOLLOW)                                                          \
	OPEN_FLAG("sync", O_SYNC)                                                                  \
	OPEN_FLAG("direct", O_DIRECT)                                                              \
	OPEN_FLAG("noatime", O_NOATIME)                                                            \
	OPEN_FLAG("path", O_PATH)                                                                  \
	OPEN_FLAG("tmpfile", O_TMPFILE)

/* ENTRY(list, how it is written, value): the lists of the kinds with one byte. */
#define FILES_ENTRIES                                                                              \
	ENTRY(mode, "0644", 0644)                                                                  \
	ENTRY(mode, "0755", 0755)                                                                  \
	ENTRY(mode, "0600", 0600)                                                                  \
	ENTRY(mode, "0777", 0777)                                                                  \
	ENTRY(mode, "0000", 0)                                                                     \
	ENTRY(mode, "0444", 0444)                                                                  \
	ENTRY(mode, "0222", 0222)                                                                  \
	ENTRY(mode, "07777", 07777)                                                                \
	ENTRY(whence, "set", SEEK_SET)                                                             \
	ENTRY(whence, "cur", SEEK_CUR)                                                             \
	ENTRY(whence, "end", SEEK_END)                                                             \
	ENTRY(whence, "data", SEEK_DATA)                                                           \
	ENTRY(whence, "hole", SEEK_HOLE)                                                           \
	ENTRY(rename, "replace", 0)                                                                \
	ENTRY(rename, "noreplace", RENAME_NOREPLACE)                                               \
	ENTRY(rename, "exchange", RENAME_EXCHANGE)                                                 \
	ENTRY(owner, "0", 0)                                                                       \
	ENTRY(owner, "1000", 1000)                                                                 \
	ENTRY(owner, "-1", -1)                                                                     \
	ENTRY(time, "now", FILES_NOW)                                                              \
	ENTRY(time, "omit", FILES_OMIT)                                                            \
	ENTRY(time, "0", 0)                                                                        \
	ENTRY(time, "1", 1)                                                                        \
	ENTRY(time, "-1", -1)                                                                      \
	ENTRY(time, "2147483647", 2147483647)                                                      \
	ENTRY(time, "4294967296", 4294967296)                                                      \
	ENTRY(xattr, "user.a", 0)                                                                  \
	ENTRY(xattr, "user.b", 1)                                                                  \
	ENTRY(xattr, "user.", 2)                                                                   \
	ENTRY(xattr, "trusted.a", 3)                                                               \
	ENTRY(xattr, "security.a", 4)                                                              \
	ENTRY(xattr, "system.posix_acl_access", 5)                                                 \
	ENTRY(xattr, "system.posix_acl_default", 6)                                                \
	ENTRY(xattr, "a", 7)                                                                       \
	ENTRY(xflag, "set", 0)                                                                     \
	ENTRY(xflag, "create", XATTR_CREATE)                                                       \
	ENTRY(xflag, "replace", XATTR_REPLACE)                                                     \
	ENTRY(fallocate, "allocate", 0)                                                            \
	ENTRY(fallocate, "keep", FALLOC_FL_KEEP_SIZE)                                              \
	ENTRY(fallocate, "punch", FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)                      \
	ENTRY(fallocate, "zero", FALLOC_FL_ZERO_RANGE)                                             \
	ENTRY(fallocate, "collapse", FALLOC_FL_COLLAPSE_RANGE)                                     \
	ENTRY(fallocate, "insert", FALLOC_FL_INSERT_RANGE)                                         \
	ENTRY(advice, "normal", POSIX_FADV_NORMAL)                                                 \
	ENTRY(advice, "willneed", POSIX_FADV_WILLNEED)                                             \
	ENTRY(advice, "dontneed", POSIX_FADV_DONTNEED)                                             \
	ENTRY(flock, "shared", LOCK_SH | LOCK_NB)                                                  \
	ENTRY(flock, "exclusive", LOCK_EX | LOCK_NB)                                               \
	ENTRY(flock, "unlock", LOCK_UN)                                                            \
	ENTRY(lock, "read", F_RDLCK)                                                               \
	ENTRY(lock, "write", F_WRLCK)                                                              \
	ENTRY(lock, "unlock", F_UNLCK)

#endif
