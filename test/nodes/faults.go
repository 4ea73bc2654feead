package nodes

import (
	"fmt"
	"os"
	"os/exec"
	"time"

	"cri-dockerd/test/engines"
)

// Reboot shuts the node down in order, like systemctl reboot, and starts it again. Its files
// remain, except those in /run and /tmp. timeout is the limit of the shutdown. Reboot returns when
// systemd has started all units.
func (n *Node) Reboot(tb engines.TB, timeout time.Duration) {
	tb.Helper()
	// The kernel ends the node's process 1 at its reboot(2), so the command cannot complete.
	_, _ = n.Try("systemctl", "reboot", "--no-block")
	n.Await(tb, timeout, "shutdown", func() bool {
		_, err := os.Stat("/proc/" + n.pid + "/ns/pid")
		return err != nil
	})

	n.Reset(tb)
}

// Reset ends all processes of the node at once, like a power failure, and starts it again. Its
// files remain, except those in /run and /tmp.
func (n *Node) Reset(tb engines.TB) {
	tb.Helper()
	pid, err := n.guard.start()
	if err != nil {
		tb.Fatalf("%s: reset: %v", n.Name, err)
	}

	n.pid = pid
	n.awaitBoot(tb, n.docker)
}

// Disconnect takes the node off the network. It keeps its address.
func (n *Node) Disconnect(tb engines.TB) { n.setLink(tb, "down") }

// Connect undoes Disconnect.
func (n *Node) Connect(tb engines.TB) { n.setLink(tb, "up") }

func (n *Node) setLink(tb engines.TB, state string) {
	tb.Helper()
	cmd := exec.Command("nsenter", "--net="+n.network.NetNS(), "ip", "link", "set", fmt.Sprint("v-", n.Name), state)
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("%s: %v: %v\n%s", n.Name, cmd, err, out)
	}
}
