package annotation

import (
	"crypto/rand"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRoundTrip(t *testing.T) {
	for name, c := range map[string]Container{
		"empty":     {},
		"no groups": {StrictGroups: &[]uint32{}},
		"groups":    {StrictGroups: &[]uint32{0, 1000, 1<<32 - 1}},
		"output":    {Output: "/run/cri-dockerd/exec"},
		"sandbox":   {Sandbox: &Sandbox{NetNS: "/run/cri-dockerd/netns/new-1"}},
		"userns": {
			UserNS:   &UserNS{UIDs: IDs{First: 65536, Size: 65536}, GIDs: IDs{First: 1, Size: 1<<32 - 2}},
			IDMapped: []string{"/data"},
		},
		"all": {
			Ambient:   []string{"CAP_NET_BIND_SERVICE"},
			Unified:   map[string]string{"memory.oom.group": "1", "hugetlb.2MB.max": "0"},
			Hugepages: map[string]uint64{"2MB": 1 << 21, "1GB": 0},

			RecursiveReadOnly: []string{"/data"},
			MountOptions:      map[string][]string{"/data": {"noexec", "nosuid"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			text, err := c.Encode()
			if err != nil {
				t.Fatal(err)
			}

			got, err := Parse(text)
			if err != nil {
				t.Fatal(err)
			}

			if diff := cmp.Diff(c, got); diff != "" {
				t.Errorf("Parse(Encode(c)) differs (-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseRejects(t *testing.T) {
	for name, text := range map[string]string{
		"empty text":          ``,
		"no version":          `{}`,
		"newer version":       `{"v":2}`,
		"unknown field":       `{"v":1,"binary":"/bin/sh"}`,
		"unknown in sandbox":  `{"v":1,"sandbox":{"rootfs":"/"}}`,
		"data after it":       `{"v":1}{"v":1}`,
		"negative group":      `{"v":1,"strictGroups":[-1]}`,
		"large group":         `{"v":1,"strictGroups":[4294967296]}`,
		"path as cgroup file": `{"v":1,"unified":{"../cpu.max":"1"}}`,
		"slash":               `{"v":1,"unified":{"a/cpu.max":"1"}}`,
		"cgroup core file":    `{"v":1,"unified":{"cgroup.procs":"1"}}`,
		"empty part":          `{"v":1,"unified":{"a..b":"1"}}`,
		"no controller":       `{"v":1,"unified":{"procs":"1"}}`,
		"page size of zero":   `{"v":1,"hugepages":{"0MB":1}}`,
		"no page size":        `{"v":1,"hugepages":{"MB":1}}`,
		"capability inside":   `{"v":1,"ambient":["CAP_A/B"]}`,
		"page size":           `{"v":1,"hugepages":{"2MB/../x":1}}`,
		"capability":          `{"v":1,"ambient":["net_admin"]}`,
		"unclean mount":       `{"v":1,"recursiveReadOnly":["/a/"]}`,
		"relative output":     `{"v":1,"output":"run"}`,
		"relative namespace":  `{"v":1,"sandbox":{"netns":"run/netns"}}`,
		"unclean namespace":   `{"v":1,"sandbox":{"netns":"/run/../netns"}}`,
		"root of the node":    `{"v":1,"userns":{"uids":{"first":0,"size":1},"gids":{"first":1,"size":1}}}`,
		"no groups":           `{"v":1,"userns":{"uids":{"first":1,"size":1}}}`,
		"invalid user":        `{"v":1,"userns":{"uids":{"first":1,"size":4294967295},"gids":{"first":1,"size":1}}}`,
		"mount option":        `{"v":1,"mountOptions":{"/a":["suid"]}}`,
		"unclean options":     `{"v":1,"mountOptions":{"/a/..":["nosuid"]}}`,
		"mapped without map":  `{"v":1,"idMapped":["/a"]}`,
		"too long":            `{"v":1,"unified":{"a.b":"` + strings.Repeat("x", maxSize) + `"}}`,
		"long value":          `{"v":1,"unified":{"a.b":"` + strings.Repeat("x", maxUnifiedValue+1) + `"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			if c, err := Parse(text); err == nil {
				t.Errorf("Parse(%.60s) = %+v, want an error", text, c)
			}
		})
	}
}

func TestEncodeRejectsWhatParseRejects(t *testing.T) {
	if text, err := (Container{Ambient: []string{"x"}}).Encode(); err == nil {
		t.Errorf("Encode = %s, want an error", text)
	}
}

// FuzzParse checks that an accepted annotation survives Encode and Parse.
func FuzzParse(f *testing.F) {
	f.Add(`{"v":1,"strictGroups":[1],"ambient":["CAP_CHOWN"],"sandbox":{"netns":"/a"}}`)
	f.Add(`{"v":1,"unified":{"a.b":"c"},"hugepages":{"2MB":1}}`)
	f.Fuzz(func(t *testing.T, text string) {
		c, err := Parse(text)
		if err != nil {
			return
		}

		again, err := c.Encode()
		if err != nil {
			t.Fatalf("Encode of %s: %v", text, err)
		}

		if got, err := Parse(again); err != nil || got.IsZero() != c.IsZero() {
			t.Fatalf("Parse(%s) = %+v, %v; want %+v", again, got, err, c)
		}
	})
}

// TestIsToken verifies that a token is a plain file name.
func TestIsToken(t *testing.T) {
	for token, want := range map[string]bool{
		rand.Text():                    true,
		"":                             false,
		"A":                            false,
		"../AAAAAAAAAAAAAAAAAAAAAAA":   false,
		"AAAAAAAAAAAAAAAAAAAAAAAA/A":   false,
		strings.Repeat("A", 27):        false,
		strings.Repeat("a", 26):        false,
		strings.Repeat("A", 25) + "\n": false,
	} {
		if got := IsToken(token); got != want {
			t.Errorf("IsToken(%q) = %v", token, got)
		}
	}
}
