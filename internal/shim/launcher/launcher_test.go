package launcher

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestReadGroup(t *testing.T) {
	long := strings.Repeat("x", maxGroup+1)
	for name, c := range map[string]struct{ spec, want string }{
		"pod":           {`{"annotations":{"io.containerd.runc.v2.group":"k8s_POD_a"}}`, "k8s_POD_a"},
		"no group":      {`{"annotations":{"other":"x"},"process":{"args":["a"]}}`, "id-1"},
		"no annotation": {`{"ociVersion":"1.2.0"}`, "id-1"},
		"not JSON":      {`{`, ""},
		"long":          {`{"annotations":{"io.containerd.runc.v2.group":"` + long + `"}}`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "config.json")
			if err := os.WriteFile(file, []byte(c.spec), 0o600); err != nil {
				t.Fatal(err)
			}

			got, err := readGroup(file, "id-1")
			if got != c.want || (err != nil) != (c.want == "") {
				t.Errorf("readGroup = %q, %v; want %q", got, err, c.want)
			}
		})
	}
}

// TestDeleteOfADeletedContainer checks that the launcher repeats the server's response, and leaves
// everything else to the server's program.
func TestDeleteOfADeletedContainer(t *testing.T) {
	t.Chdir(t.TempDir())
	if _, ok := readDeleted(DeletedFile); ok {
		t.Error("a response without a file")
	}

	for name, text := range map[string]string{"empty": "", "too long": strings.Repeat("x", maxResponse+1)} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, ok := readDeleted(name); ok {
			t.Errorf("response of a file that is %s: %q", name, got)
		}
	}

	if err := os.WriteFile(DeletedFile, []byte("response"), 0o600); err != nil {
		t.Fatal(err)
	}

	var out strings.Builder
	err := Run([]string{"-namespace", "moby", "-id", "a", "delete"}, &out)
	if err != nil || out.String() != "response" {
		t.Errorf("delete wrote %q, %v", out.String(), err)
	}
}

// TestParse passes the arguments of containerd 1.7 and 2.x.
func TestParse(t *testing.T) {
	c, err := parse([]string{"-namespace", "moby", "-address", "/run/c.sock", "-publish-binary", "/usr/bin/containerd",
		"-id", "abc", "-debug", "start"})
	if want := (call{"moby", "abc", "/run/c.sock", true, "start"}); err != nil || c != want {
		t.Errorf("parse = %+v, %v; want %+v", c, err, want)
	}

	c, err = parse([]string{"-namespace", "moby", "-id", "abc", "-bundle", "/run/b", "delete"})
	if err != nil || c.action != "delete" {
		t.Errorf("parse = %+v, %v; want delete", c, err)
	}

	if _, err := parse([]string{"-namespace", "moby", "start"}); err == nil {
		t.Error("a start without an ID was accepted")
	}
}

// TestSocket checks that every part of the name counts, and that no part can imitate another.
func TestSocket(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range []call{
		{namespace: "moby", address: "/a"},
		{namespace: "moby", address: "/b"},
		{namespace: "plugins.moby", address: "/a"},
		{namespace: "a", address: "moby"},
	} {
		for _, group := range []string{"g", "h"} {
			socket := c.socket(group)
			if seen[socket] || len(socket) > 107 {
				t.Errorf("socket %s of %+v is not unique, or too long", socket, c)
			}
			seen[socket] = true
		}
	}
}

func TestAccepts(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}

	l.SetUnlinkOnClose(false)
	if !accepts(socket) {
		t.Error("a listening socket does not accept")
	}

	l.Close()
	if accepts(socket) {
		t.Error("the socket of an ended server accepts")
	}
}
