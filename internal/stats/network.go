package stats

import (
	"bytes"
	"fmt"
	"strconv"
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

// Network are the devices in a process's network namespace, without lo (proc_pid_net(5), dev).
func (r *Reader) Network(pid int) (out []Interface, err error) {
	err = r.processFile(pid, "net/dev", func(content []byte) {
		for line := range bytes.Lines(content) {
			name, counters, ok := bytes.Cut(line, []byte(":"))
			if name = bytes.TrimSpace(name); !ok || string(name) == "lo" {
				continue
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
				continue
			}
			out = append(out, Interface{
				Name: string(name), RxBytes: n[rxBytes], RxPackets: n[rxPackets], RxErrors: n[rxErrors], RxDropped: n[rxDropped],
				TxBytes: n[txBytes], TxPackets: n[txPackets], TxErrors: n[txErrors], TxDropped: n[txDropped],
			})
		}
	})
	if err != nil {
		return nil, fmt.Errorf("network devices of process %d: %w", pid, err)
	}
	return out, nil
}
