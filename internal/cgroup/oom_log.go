package cgroup

import (
	"bytes"
	"errors"
	"regexp"

	"golang.org/x/sys/unix"
)

const (
	// maxLogRecord is the size of the longest record of the kernel's log, in bytes
	// (CONSOLE_EXT_LOG_MAX of the kernel, printk.h).
	maxLogRecord = 8192
	// maxLogRecords limits the records that are read. Buffers of the usual sizes have fewer.
	maxLogRecords = 50_000
)

// containerGroup matches the group of a container in a path: its ID, or a scope of systemd.
var containerGroup = regexp.MustCompile(`/(?:docker-)?([0-9a-f]{64})(?:\.scope)?\b`)

// hasLoggedKill reports whether the kernel's log has an OOM kill in a container's group. It is the
// last resort for a container whose counter was never read: systemd may remove the group of a short
// container before its watch begins, and on cgroup v1 nothing else counts its kills. The kernel
// logs ten kills in five seconds, older ones are overwritten, and reading may be forbidden: no
// record proves nothing. isContainer reports whether an ID is of a container.
func (k Kernel) hasLoggedKill(id string, isContainer func(id string) bool) bool {
	fd, err := unix.Open(k.Log, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd) //nolint:errcheck // it was only read

	record := make([]byte, maxLogRecord)
	for range maxLogRecords {
		n, err := unix.Read(fd, record)
		switch {
		case errors.Is(err, unix.EPIPE), errors.Is(err, unix.EINTR): // EPIPE: records were overwritten
			continue
		case err != nil || n == 0: // EAGAIN at the end
			return false
		}

		for line := range bytes.Lines(record[:n]) {
			if isKillOf(line, id, isContainer) {
				return true
			}
		}
	}

	return false
}

// isKillOf reports whether a record of the kernel's log is an OOM kill in a container's group
// (Documentation/ABI/testing/dev-kmsg). Other programs can add records, but not with the kernel's
// facility 0. A container may name the groups below its own like another container, so the
// outermost container of the record counts: the paths begin at the kernel's root, and a node may
// itself be a container.
func isKillOf(record []byte, id string, isContainer func(id string) bool) bool {
	prefix, text, ok := bytes.Cut(record, []byte(";"))
	level, _, _ := bytes.Cut(prefix, []byte(","))
	isKernel := len(level) == 1 && level[0] >= '0' && level[0] <= '7'
	if !ok || !isKernel || !bytes.HasPrefix(text, []byte("oom-kill:")) || !bytes.Contains(text, []byte(id)) {
		return false
	}

	for _, m := range containerGroup.FindAllSubmatch(text, -1) {
		if found := string(m[1]); found == id || isContainer(found) {
			return found == id
		}
	}

	return false
}

// searchLog records the kill of a container whose counter was never read, if the kernel has logged
// it.
func (w *OOMWatcher) searchLog(c *watched) {
	if w.kernel.hasLoggedKill(c.id, w.isWatched) {
		w.recordUnread(c)
	}
}

func (w *OOMWatcher) isWatched(id string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.watched[id] != nil
}
