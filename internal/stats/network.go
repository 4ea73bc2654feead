package stats

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Interface is a network device with its counters since its creation.
type Interface struct {
	Name                                    string
	RxBytes, RxPackets, RxErrors, RxDropped uint64
	TxBytes, TxPackets, TxErrors, TxDropped uint64
}

// Columns of /proc/net/dev.
const (
	rxBytes, rxPackets, rxErrors, rxDropped = 0, 1, 2, 3
	txBytes, txPackets, txErrors, txDropped = 8, 9, 10, 11
	allColumns                              = 16
)

// DefaultInterface is the pod's own device in every network (CNI_IFNAME of the CNI specification,
// as the kubelet expects it).
const DefaultInterface = "eth0"

// maxDevices limits the read of /proc/net/dev, in bytes: some 30,000 devices. A container with
// NET_ADMIN may create any number.
const maxDevices = 4 << 20

// Network returns up to most devices in the network namespace of a container's main process,
// without lo (proc_pid_net(5), dev). DefaultInterface is included if it exists. The others follow
// the kernel's order. Names other than printable UTF-8 are escaped. It returns NotFound if the
// container has ended.
func (r *Reader) Network(id string, pid, most int) ([]Interface, error) {
	g, err := r.findGroup(key{id: id}, pid)
	if err != nil {
		return nil, err
	}

	d := devices{most: most}
	read := 0
	err = g.ReadProcessPieces("net/dev", func(piece []byte) bool {
		read += len(piece)
		d.add(piece)
		return !d.isFull() && read < maxDevices
	})
	if err != nil {
		return nil, fmt.Errorf("network devices of process %d: %w", pid, err)
	}

	return d.found, nil
}

// devices parses /proc/net/dev in pieces.
type devices struct {
	most       int
	found      []Interface
	hasDefault bool
	rest       []byte // start of a line continued in the next piece
}

// add parses the lines of a piece.
func (d *devices) add(piece []byte) {
	for len(piece) > 0 && !d.isFull() {
		end := bytes.IndexByte(piece, '\n')
		if end < 0 {
			d.rest = append(d.rest, piece...)
			return
		}

		line := piece[:end]
		if len(d.rest) > 0 {
			line = append(d.rest, line...)
		}

		d.addLine(line)
		d.rest, piece = d.rest[:0], piece[end+1:]
	}
}

// isFull reports whether the list is complete. It reserves room for the default interface until
// that is found.
func (d *devices) isFull() bool { return d.hasDefault && len(d.found) >= d.most }

// addLine parses one device.
func (d *devices) addLine(line []byte) {
	at := bytes.LastIndexByte(line, ':') // names have no colon since Linux 3.18 (dev_valid_name)
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
		Name:      escapeName(string(name)),
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

// escapeName escapes all but printable UTF-8, and backslashes, as \xNN. Unlike a replacement
// character this keeps different names distinct. Two equal labels would invalidate the entire list
// of metrics.
func escapeName(name string) string {
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
