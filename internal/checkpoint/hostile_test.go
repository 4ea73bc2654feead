package checkpoint

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// withPort returns a file with one port of these fields.
func withPort(fields string) string {
	return `{"version":"v1","name":"web","namespace":"default","data":{"port_mappings":[{` + fields + `}]}}`
}

// hostileFiles returns invalid contents by description.
func hostileFiles() map[string]string {
	return map[string]string{
		"empty":                          "",
		"torn":                           `{"version":"v1","name":"web","data":{"port_map`,
		"a list":                         "[]",
		"other bytes":                    "\xff\xfe\x1b[2J",
		"deep":                           strings.Repeat(`{"data":`, 20000),
		"a name with an injection":       `{"name":"web;IP=10.0.0.1","namespace":"default"}`,
		"a namespace with a path":        `{"name":"web","namespace":"../../etc"}`,
		"a long name":                    `{"name":"` + strings.Repeat("x", maxName+1) + `"}`,
		"a name with control characters": `{"name":"\u001b[2J\u202e"}`,
		"a port too high":                withPort(`"protocol":"tcp","container_port":80,"host_port":65536`),
		"a port too low":                 withPort(`"protocol":"tcp","container_port":-1,"host_port":80`),
		"a port beyond int32":            withPort(`"protocol":"tcp","container_port":80,"host_port":99999999999`),
		"an invalid protocol":            withPort(`"protocol":"icmp -j ACCEPT","container_port":80,"host_port":80`),
		"an invalid address": withPort(`"protocol":"tcp","container_port":80,"host_port":80,"host_ip":"0.0.0.0/0 ` +
			`-j ACCEPT"`),
		"an address with a zone": withPort(`"protocol":"tcp","container_port":80,"host_port":80,` +
			`"host_ip":"fe80::1%x y"`),
		"too many ports": `{"data":{"port_mappings":[` + strings.Repeat("{},", maxPorts) + `{}]}}`,
	}
}

func TestHostileContents(t *testing.T) {
	for name, content := range hostileFiles() {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			put(t, root, string(id), content)
			c, err := New(root).Read(id)
			if !errdefs.IsDataLoss(err) || c.Name != "" || len(c.Ports) > 0 || c.HostNetwork {
				t.Fatalf("%+v, %v", c, err)
			}

			if s := err.Error(); len(s) > 2000 || !utf8.ValidString(s) || strings.ContainsAny(s, "\x1b\u202e") {
				t.Errorf("an error of %d bytes: %.300q", len(s), s)
			}
		})
	}
}

// TestPlantedFiles verifies that only regular files of a bounded size are read and listed, without
// following links or blocking.
func TestPlantedFiles(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte(`{"data":{"host_network":true}}`), 0o600); err != nil {
		t.Fatal(err)
	}

	for name, c := range map[string]struct {
		plant  func(file string) error
		listed bool
	}{
		"a link":      {func(file string) error { return os.Symlink(outside, file) }, false},
		"a FIFO":      {func(file string) error { return unix.Mkfifo(file, 0o600) }, false},
		"a device":    {func(file string) error { return os.Symlink("/dev/zero", file) }, false},
		"a directory": {func(file string) error { return os.Mkdir(file, 0o700) }, false},
		"1 TiB": {func(file string) error {
			return errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, 1<<40))
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			file := put(t, root, string(id), "")
			if err := errors.Join(os.Remove(file), c.plant(file)); err != nil {
				t.Fatal(err)
			}

			f := New(root)
			done := make(chan error, 1)
			go func() { _, err := f.Read(id); done <- err }()
			select {
			case err := <-done:
				if !errdefs.IsNotFound(err) && !errdefs.IsDataLoss(err) {
					t.Errorf("read: %v", err)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("Read blocks")
			}

			if ids := f.List(); (len(ids) == 1) != c.listed {
				t.Errorf("list: %v", ids)
			}
			if err := f.Write(id, Checkpoint{Name: "new"}); (err == nil) == (name == "a directory") {
				t.Errorf("write: %v", err)
			}

			if b, err := os.ReadFile(outside); err != nil || !strings.Contains(string(b), "true") {
				t.Errorf("the file outside has %q, %v", b, err)
			}
		})
	}

	root := t.TempDir()
	for _, name := range []string{".", "lock", strings.ToUpper(string(id)), string(id)[:63], string(id) + "0"} {
		if name != "." {
			put(t, root, name, "{}")
		}
	}

	if ids := New(root).List(); len(ids) != 0 {
		t.Errorf("list: %v", ids)
	}
}

func TestWriteRejectsInvalidCheckpoint(t *testing.T) {
	root := t.TempDir()
	for _, c := range []Checkpoint{
		{Name: "web;x"},
		{Ports: []*runtimeapi.PortMapping{{HostPort: 65536}}},
		{Ports: []*runtimeapi.PortMapping{{Protocol: 9}}},
		{Ports: []*runtimeapi.PortMapping{{HostIp: "x"}}},
	} {
		if err := New(root).Write(id, c); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", c, err)
		}
	}

	if remaining, _ := filepath.Glob(filepath.Join(root, "*/*")); len(remaining) > 0 {
		t.Errorf("files remain: %v", remaining)
	}
}

// FuzzCheckpoint reads a file with any content and name. Accepted values are valid and survive a
// round trip, and no other file of the directory is touched.
func FuzzCheckpoint(f *testing.F) {
	f.Add(string(id), []byte(withPort(`"protocol":"udp","container_port":53,"host_port":5353,"host_ip":"192.0.2.1"`)))
	f.Add(string(id), []byte(`{"version":"v1","name":"proxy","namespace":"kube-system","data":{"host_network":true},`+
		`"checksum":1}`))
	f.Add("../outside", []byte("{}"))
	for _, content := range hostileFiles() {
		if len(content) < 1<<12 {
			f.Add(string(id), []byte(content))
		}
	}

	f.Fuzz(func(t *testing.T, name string, content []byte) {
		root := t.TempDir()
		outside := put(t, root, "../outside", "outside")
		parsed, err := model.ParseContainerID(name)
		if err != nil {
			parsed = id
		}

		put(t, root, string(parsed), string(content))
		files := New(root)

		c, err := files.Read(parsed)
		if err != nil {
			if !errdefs.IsDataLoss(err) || !utf8.ValidString(err.Error()) || len(err.Error()) > 4096 {
				t.Fatalf("%d bytes: %.200v", len(err.Error()), err)
			}
			return
		}

		if len(c.Ports) > maxPorts || !isName(c.Name) || !isName(c.Namespace) ||
			strings.ContainsAny(c.Name+c.Namespace, ";=/\x00\n ") {
			t.Errorf("%d ports, %q, %q", len(c.Ports), c.Name, c.Namespace)
		}

		for _, p := range c.Ports {
			_, known := runtimeapi.Protocol_name[int32(p.Protocol)]
			if p.HostPort < 0 || p.HostPort > 65535 || p.ContainerPort < 0 || p.ContainerPort > 65535 || !known {
				t.Errorf("port %v", p)
			}
			if _, err := netip.ParseAddr(p.HostIp); p.HostIp != "" && err != nil {
				t.Errorf("address %q", p.HostIp)
			}
		}

		if err := files.Write(parsed, c); err != nil {
			t.Fatal(err)
		}

		again, err := files.Read(parsed)
		if err != nil || fmt.Sprint(again) != fmt.Sprint(c) {
			t.Errorf("%+v became %+v, %v", c, again, err)
		}

		if err := files.Remove(parsed); err != nil || len(files.List()) != 0 {
			t.Errorf("%v, list %v", err, files.List())
		}

		if b, err := os.ReadFile(outside); err != nil || string(b) != "outside" {
			t.Errorf("the file outside has %q, %v", b, err)
		}
	})
}
