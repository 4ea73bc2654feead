package stats

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
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
func (r *Reader) Network(pid int) ([]Interface, error) {
	b, err := os.ReadFile(filepath.Join(r.kernel.Proc, strconv.Itoa(pid), "net/dev"))
	if err != nil {
		return nil, fmt.Errorf("network devices of process %d: %w", pid, err)
	}
	var out []Interface
	for line := range strings.Lines(string(b)) {
		name, counters, ok := strings.Cut(line, ":")
		if name = strings.TrimSpace(name); !ok || name == "lo" {
			continue
		}
		var n [allColumns]uint64
		column := 0
		for f := range strings.FieldsSeq(counters) {
			if column < allColumns {
				n[column], _ = strconv.ParseUint(f, 10, 64)
			}
			column++
		}
		if column < allColumns {
			continue
		}
		out = append(out, Interface{
			Name: strings.Clone(name), RxBytes: n[rxBytes], RxPackets: n[rxPackets], RxErrors: n[rxErrors], RxDropped: n[rxDropped],
			TxBytes: n[txBytes], TxPackets: n[txPackets], TxErrors: n[txErrors], TxDropped: n[txDropped],
		})
	}
	return out, nil
}
