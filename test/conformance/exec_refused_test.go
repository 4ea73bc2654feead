package conformance

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// refusedFiles creates files of every kind refused by execve(2). The script runs in the container.
const refusedFiles = `
mkdir /x /x/dir '/x/with space'
echo 'echo no' > /x/plain
cp /x/plain /x/text; cp /x/plain '/x/with space/text'; : > /x/empty
printf '\177ELF' > /x/short
head -c 4096 /bin/busybox > /x/foreign; printf '\377\377' | dd of=/x/foreign bs=1 seek=18 conv=notrunc 2>/dev/null
printf '#!/no/such/interpreter\n' > /x/orphan
printf '#!/x/dir\n' > /x/through-dir
printf '#!/x/plain\n' > /x/through-plain
printf '#!\n' > /x/no-interpreter
ln -s loop /x/loop; ln -s /no/such /x/dangling; mkfifo /x/fifo
cp /bin/busybox /dev/shm/mounted-noexec
chmod 755 /x/text /x/empty /x/short /x/foreign /x/orphan /x/through-* /x/no-interpreter /x/fifo '/x/with space/text' /dev/shm/mounted-noexec
cp /x/text /bin/refused-text; cp /x/orphan /bin/refused-orphan; chmod 755 /bin/refused-*
touch /x/ready; sleep 1000`

// TestExecOfRefusedFiles runs commands refused by execve(2). They end with exit code 126, missing
// ones with 127. Stderr has the engine's text once, regardless of the failing step of the engine.
func TestExecOfRefusedFiles(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		cc := n.containerConfig(sh(refusedFiles))
		cc.WorkingDir = "/x"
		id := n.startConfig(t, n.runPod(t, cfg), cfg, cc)
		eventually(t, "creation of the files", func() bool {
			return strings.Contains(n.exec(t, id, "ls", "/x"), "ready")
		})

		for _, c := range []struct {
			cmd  string
			code int32
		}{
			{"/x/plain", 126},
			{"/x/dir", 126},
			{"/x/text", 126},
			{"./text", 126},
			{"refused-text", 126},
			{"/x/with space/text", 126},
			{"/x/empty", 126},
			{"/x/short", 126},
			{"/x/foreign", 126},
			{"/x/orphan", 126},
			{"refused-orphan", 126},
			{"/x/through-dir", 126},
			{"/x/through-plain", 126},
			{"/x/no-interpreter", 126},
			{"/x/fifo", 126},
			{"/x/loop", 126},
			{"/dev/shm/mounted-noexec", 126},
			{"/x/" + strings.Repeat("n", 300), 126},
			{"/x/dangling", 127},
			{"/x/none", 127},
			{"./none", 127},
			{"no-such-command", 127},
			{"/x/plain/below", 127},
		} {
			t.Run(c.cmd, func(t *testing.T) { n.assertRefused(t, id, c.cmd, c.code) })
		}

		t.Run("as a user", func(t *testing.T) { refusedToUser(t, n) })
	})
}

// refusedToUser runs files without permission for the container's user.
func refusedToUser(t *testing.T, n *node) {
	dir := n.tempDir(t)
	locked, script := filepath.Join(dir, "locked"), []byte("#!/bin/sh\n")
	err := errors.Join(
		os.Chmod(dir, 0o755),
		os.Mkdir(locked, 0o700),
		os.WriteFile(filepath.Join(locked, "script"), script, 0o700),
		os.WriteFile(filepath.Join(dir, "private"), script, 0o700),
	)
	if err != nil {
		t.Fatal(err)
	}

	cfg := n.podConfig(t)
	cc := n.containerConfig(sh("sleep 1000"))
	cc.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
	cc.Mounts = []*runtimeapi.Mount{{HostPath: dir, ContainerPath: "/host"}}
	id := n.startConfig(t, n.runPod(t, cfg), cfg, cc)
	n.assertRefused(t, id, "/host/locked", 126)
	direct := n.own(t).Command("docker", "-H", "unix://"+n.own(t).Socket, "exec", id, "/host/private")
	if _ = direct.Run(); direct.ProcessState.ExitCode() == 2 {
		// Newer releases of runc still have CAP_DAC_OVERRIDE at execve(2). The shell runs and
		// cannot read the script.
		return
	}

	n.assertRefused(t, id, "/host/private", 126)
	n.assertRefused(t, id, "/host/locked/script", 126)
}

// assertRefused runs a command with ExecSync and with Exec, without and with a terminal, and checks
// its exit code.
func (n *node) assertRefused(t *testing.T, id, cmd string, code int32) {
	r, err := n.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
		ContainerId: id,
		Cmd:         []string{cmd, "arg"},
		Timeout:     20,
	})
	if err != nil || r.ExitCode != code || len(r.Stdout) > 0 || strings.Count(string(r.Stderr), "\n") != 1 {
		t.Errorf("ExecSync: %v, %v, want exit code %d and one line on stderr", r, err, code)
	}

	for _, tty := range []bool{false, true} {
		out := map[bool]byte{false: 2, true: 1}[tty]
		x, err := n.Runtime.Exec(t.Context(), &runtimeapi.ExecRequest{
			ContainerId: id,
			Cmd:         []string{cmd},
			Stdout:      true,
			Stderr:      !tty,
			Tty:         tty,
		})
		if err != nil {
			t.Fatal(err)
		}

		got := collect(t, n.stream(t, x.Url), 3, "}")
		if strings.Count(got[out], "\n") != 1 || !tty && got[1] != "" ||
			!strings.Contains(got[3], fmt.Sprintf(`"%d"`, code)) {
			t.Errorf("Exec, TTY %t: %q, want exit code %d", tty, got, code)
		}
	}
}
