package cluster

import (
	"slices"
	"strconv"
	"strings"
	"testing"
)

// testTop checks the usage of nodes and pods from metrics-server. Each pod allocates 24 MB.
func (c *cluster) testTop(t *testing.T, pods []string) {
	// awaitUsage waits for a line for each name, with the memory in Mi in a column.
	awaitUsage := func(names []string, column int, least, most int, args ...string) {
		t.Helper()
		args = append(append([]string{kubeconfig, "top"}, args...), "--no-headers")
		c.nodes[0].Await(t, timeout, strings.Join(args, " "), func() bool {
			out, err := c.nodes[0].Try("kubectl", args...)
			var got []string
			for line := range strings.Lines(out) {
				if f := strings.Fields(line); len(f) > column && isWithin(f[column], least, most) {
					got = append(got, f[0])
				}
			}

			slices.Sort(got)

			return err == nil && slices.Equal(got, slices.Sorted(slices.Values(names)))
		})
	}

	awaitUsage(strings.Fields(c.names), 3, 100, 1<<20, "node")
	awaitUsage(pods, 2, 19, 40, "pod", "-l", "app=each")
	t.Log("\n" + c.kubectl(t, "top", "node") + c.kubectl(t, "top", "pod", "-A"))
}

// isWithin reports whether a quantity in Mi is between least and most.
func isWithin(quantity string, least, most int) bool {
	n, err := strconv.Atoi(strings.TrimSuffix(quantity, "Mi"))
	return err == nil && least <= n && n <= most
}
