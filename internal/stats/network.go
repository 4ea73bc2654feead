package stats

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Interface is a network device with its counters since it was made.
type Interface struct {
	Name                                    string
	RxBytes, RxPackets, RxErrors, RxDropped uint64
	TxBytes, TxPackets, TxErrors, TxDropped uint64
}

// columns of /proc/net/dev.
const (
	rxBytes, rxPackets, rxErrors, rxDropped = 0, 1, 2, 3
	txBytes, txPackets, txErrors, txDropped = 8, 9, 10, 11
	allColumns                              = 16
)

// DefaultInterface is the pod's own device in every network (CNI_IFNAME of the CNI specification,
// as the kubelet expects it).
const DefaultInterface = "eth0"

// maxDevices bounds /proc/net/dev: some 30,000 devices. A container with NET_ADMIN may create as
// many as it likes.
const maxDevices = 4 << 20

// Network returns the devices in the network namespace of a container's main process, without lo
// (proc_pid_net(5), dev): DefaultInterface, if there is one, and others in the kernel's order, at
// most most in all. Names that are not printable UTF-8 are escaped. NotFound if the container has
// ended.
func (r *Reader) Network(id string, pid, most int) ([]Interface, error) {
	g, err := r.group(key{id: id}, pid)
	if err != nil {
		return nil, err
	}

	d := devices{most: most}
	read := 0
	err = g.EachOfProcess("net/dev", func(piece []byte) bool {
		read += len(piece)
		d.add(piece)
		return !d.full() && read < maxDevices
	})
	if err != nil {
		return nil, fmt.Errorf("network devices of process %d: %w", pid, err)
	}

	return d.found, nil
}

// devices are read from pieces of /proc/net/dev.
type devices struct {
	most       int
	found      []Interface
	hasDefault bool
	rest       []byte // of a line whose end is in the next piece
}

// add parses the lines of a piece.
func (d *devices) add(piece []byte) {
	for len(piece) > 0 && !d.full() {
		end := bytes.IndexByte(piece, '\n')
		if end < 0 {
			d.rest = append(d.rest, piece...)
			return
		}

		line := piece[:end]
		if len(d.rest) > 0 {
			line = append(d.rest, line...)
		}

		d.line(line)
		d.rest, piece = d.rest[:0], piece[end+1:]
	}
}

// full says that nothing more is of interest. Room for the default interface is kept until it is
// found.
func (d *devices) full() bool { return d.hasDefault && len(d.found) >= d.most }

// line parses one device.
func (d *devices) line(line []byte) {
	at := bytes.LastIndexByte(line, ':') // a name has none since Linux 3.18 (dev_valid_name)
	if at < 0 {
		return
	}

	name, counters := bytes.TrimLeft(line[:at], " "), line[at+1:]
	isDefault := string(name) == DefaultInterface
	if string(name) == "lo" || d.hasDefault && isDefault || !isDefault && !d.hasDefault && len(d.found) >= d.most-1 {
		return
	}

	var n [allColumns]uint64
	column := 0
	for f := range bytes.FieldsSeq(counters) {
		if column < allColumns {
			n[column], _ = strconv.ParseUint(string(f), 10, 64)
		}
		column++
	}

	if column < allColumns {
		return
	}

	d.hasDefault = d.hasDefault || isDefault
	d.found = append(d.found, Interface{
		Name:      printable(string(name)),
		RxBytes:   n[rxBytes],
		RxPackets: n[rxPackets],
		RxErrors:  n[rxErrors],
		RxDropped: n[rxDropped],
		TxBytes:   n[txBytes],
		TxPackets: n[txPackets],
		TxErrors:  n[txErrors],
		TxDropped: n[txDropped],
	})
}

// printable escapes what is not printable UTF-8, and backslashes, as \xNN. Unlike a replacement it
// keeps different names different: two equal labels would spoil the whole list of metrics.
func printable(name string) string {
	clean := func(r rune) bool { return unicode.IsPrint(r) && r != '\\' }
	if utf8.ValidString(name) && strings.IndexFunc(name, func(r rune) bool { return !clean(r) }) < 0 {
		return name
	}

	var b strings.Builder
	for len(name) > 0 {
		r, size := utf8.DecodeRuneInString(name)
		if clean(r) && (r != utf8.RuneError || size > 1) {
			b.WriteString(name[:size])
		} else {
			for _, c := range []byte(name[:size]) {
				fmt.Fprintf(&b, `\x%02x`, c)
			}
		}

		name = name[size:]
	}

	return b.String()
}
