package stats

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

const counters = ": 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n"

// TestNetworkIsBounded creates very many devices with arbitrary names, as a pod may. It expects a
// bounded list with the default device.
func TestNetworkIsBounded(t *testing.T) {
	var all strings.Builder
	for i := range 20_000 {
		fmt.Fprintf(&all, "\xffveth%d\x1b%s", i, counters)
	}

	for name, dev := range map[string]string{
		"first": "eth0" + counters + all.String(),
		"last":  all.String() + "eth0" + counters,
	} {
		t.Run(name, func(t *testing.T) {
			m, r := newMachine(t)
			m.write("proc/7/net/dev", dev)
			got, err := r.Network(id, 7, 5)
			if err != nil || len(got) != 5 {
				t.Fatalf("%d devices, %v", len(got), err)
			}

			defaults := 0
			for _, d := range got {
				if d.Name == DefaultInterface {
					defaults++
				}
				if !utf8.ValidString(d.Name) || d.RxBytes != 1 || d.TxDropped != 8 {
					t.Errorf("unexpected device %+v", d)
				}
			}

			if defaults != 1 {
				t.Errorf("devices %v, want exactly one default interface", got)
			}
		})
	}

	t.Run("endless", func(t *testing.T) {
		m, r := newMachine(t)
		m.write("proc/7/net/dev", strings.Repeat(all.String(), 20)+"eth0"+counters) // beyond the limit
		began := time.Now()
		if got, err := r.Network(id, 7, 5); err != nil || len(got) != 4 || time.Since(began) > 2*time.Second {
			t.Errorf("%d devices, %v in %v", len(got), err, time.Since(began))
		}
	})
}

// TestNetworkOfReusedPID expects an error rather than the devices of another pod.
func TestNetworkOfReusedPID(t *testing.T) {
	m, r := newMachine(t)
	m.write("proc/7/net/dev", "eth0"+counters)
	if got, err := r.Network(id, 7, 5); err != nil || len(got) != 1 {
		t.Fatalf("devices %v, %v; want one", got, err)
	}

	if err := os.RemoveAll(filepath.Join(m.dir, "proc/7")); err != nil {
		t.Fatal(err)
	}

	m.write("proc/7/net/dev", "another"+counters)
	m.write("proc/7/cgroup", "0::/kubepods/podother/beef\n")
	if got, err := r.Network(id, 7, 5); err == nil {
		t.Errorf("devices of another pod: %v", got)
	}
}

func FuzzNetwork(f *testing.F) {
	f.Add([]byte("  eth0"+counters+"a:b"+counters+`x\y`+counters), 7, 3)
	f.Add([]byte("\xff\xfe: 1 2\n:::\n\n eth0:"), 1, 1)
	f.Fuzz(func(t *testing.T, dev []byte, cut, most int) {
		if most < 1 || most > 100 || cut < 1 {
			return
		}

		parse := func(cut int) []Interface {
			d := devices{most: most}
			for rest := dev; len(rest) > 0 && !d.isFull(); {
				n := min(cut, len(rest))
				d.add(rest[:n])
				rest = rest[n:]
			}
			return d.found
		}

		pieces, whole := parse(cut), parse(len(dev)+1)
		if len(pieces) != len(whole) || len(pieces) > most {
			t.Errorf("%d devices in pieces, %d at once, at most %d", len(pieces), len(whole), most)
		}

		for i := range pieces {
			if pieces[i] != whole[i] {
				t.Errorf("%+v in pieces, %+v at once", pieces[i], whole[i])
			}
			if !utf8.ValidString(pieces[i].Name) || strings.IndexFunc(pieces[i].Name, unicode.IsControl) >= 0 {
				t.Errorf("name %q", pieces[i].Name)
			}
		}
	})
}

// FuzzEscapeName expects different names to remain distinct, since equal labels would invalidate an
// entire list of metrics.
func FuzzEscapeName(f *testing.F) {
	f.Add("eth0", "eth\xff")
	f.Add(`\xff`, "\xff")
	f.Add("\uFFFD", "\xef\xbf")
	f.Fuzz(func(t *testing.T, a, b string) {
		pa, pb := escapeName(a), escapeName(b)
		if (a == b) != (pa == pb) {
			t.Errorf("%q and %q become %q and %q", a, b, pa, pb)
		}
		if !utf8.ValidString(pa) || len(pa) > 4*len(a) {
			t.Errorf("name %q is invalid or too long", pa)
		}
	})
}

// TestDescriptorsAreBounded counts the descriptors of this process after opening very many.
func TestDescriptorsAreBounded(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}

	const many = maxCounted + 1000
	if limit.Max < many+100 {
		t.Fatalf("the hard limit of descriptors is %d", limit.Max)
	}

	raised := limit
	raised.Cur = limit.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &raised); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit) //nolint:errcheck // the test's process ends

	for range many {
		fd, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 100)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd) //nolint:errcheck // a duplicate
	}

	m, r := newMachine(t)
	if err := os.Symlink(fmt.Sprintf("/proc/%d/fd", os.Getpid()), filepath.Join(m.dir, "proc/7/fd")); err != nil {
		t.Fatal(err)
	}

	began := time.Now()
	if _, err := os.ReadDir("/proc/self/fd"); err != nil {
		t.Fatal(err)
	}
	limitTime := max(time.Second, 2*time.Since(began)) // a slow machine takes a second to list them

	began = time.Now()
	p, err := r.Descriptors(id, 7)
	took := time.Since(began)
	if err != nil || p.Sockets != nil || took > limitTime {
		t.Errorf("%+v, %v in %v", p, err, took)
	}

	var st unix.Stat_t
	if err := unix.Stat("/proc/self/fd", &st); err != nil {
		t.Fatal(err)
	}

	if reported := st.Size > 0; reported != (p.Files != nil) { // since Linux 6.2
		t.Errorf("kernel reports the number of descriptors: %v, got %+v", reported, p)
	}
	if p.Files != nil && (*p.Files < many || *p.Files > many+1000) {
		t.Errorf("%d descriptors", *p.Files)
	}
}

// TestIsPodGroup accepts only the kubelet's names for pods.
func TestIsPodGroup(t *testing.T) {
	for name, want := range map[string]bool{
		"pod0a-1b":                          true,
		"kubepods-burstable-pod0a_1b.slice": true,
		"pod0a_1b.slice":                    true,
		"pod0a-1b2":                         false,
		"xpod0a-1b":                         false,
		"kubepods-podx0a_1b.slice":          false,
		"0a-1b":                             false,
		"kubepods-pod0a-1b.slice":           false,
		"pod":                               false,
		"":                                  false,
	} {
		t.Run(name, func(t *testing.T) {
			if got := isPodGroup(name, "0a-1b"); got != want {
				t.Errorf("isPodGroup = %v, want %v", got, want)
			}
		})
	}
}

// TestForgetWhileReading expects a reader never to read another file through a closed descriptor.
func TestForgetWhileReading(t *testing.T) {
	m, r := newMachine(t)
	m.write("proc/7/net/dev", "eth0"+counters)
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for range 300 {
				if got, err := r.Network(id, 7, 5); err == nil && (len(got) != 1 || got[0].Name != DefaultInterface) {
					t.Errorf("devices of another file: %+v", got)
				}
				if u, err := r.Container(id, 7); err == nil && u.Memory.Usage != 100 {
					t.Errorf("usage of another file: %+v", u)
				}
			}
		})
	}

	for range 300 {
		r.Forget(id)
	}

	readers.Wait()
}
