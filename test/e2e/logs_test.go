package e2e

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// chattyLines is the number of lines printed by the pod below, about 9 MB within 20 s. The kubelet
// checks the size every 3 s and rotates at 1 MiB.
const chattyLines = 40000

const chattyPod = `apiVersion: v1
kind: Pod
metadata: {name: chatty, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: chatty
    image: cri-test/busybox:latest
    imagePullPolicy: Never
    command:
    - sh
    - -c
    - |
      pad=$(printf '%0200d' 0) n=0
      while [ $n -lt LINES ]; do
        n=$((n+1)); echo $n $pad
        [ $((n % 200)) != 0 ] || usleep 100000
      done
      sleep 1000
`

// rotation verifies that the kubelet rotates and compresses the log of a verbose container and
// keeps three files. A reader following the log gets every line once and in order.
func rotation(t *testing.T, k *kubelet) {
	k.apply(t, "chatty", strings.Replace(chattyPod, "LINES", strconv.Itoa(chattyLines), 1))
	uid := k.waitRunning(t, "chatty").Metadata.UID
	dir := filepath.Join(k.engine.Dir, "root/var/log/pods/default_chatty-node_"+uid+"/chatty")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()

	followed := make(chan error, 1)
	go func() { followed <- k.follow(ctx, "/containerLogs/default/chatty-node/chatty?follow=true") }()
	seen := map[string]bool{} // rotated logs
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()

	for err, end := error(nil), false; !end; {
		select {
		case err = <-followed:
			end = true
		case <-tick.C:
		}

		if err != nil {
			t.Fatalf("follow: %v", err)
		}

		files := logFiles(t, dir)
		if len(files) > 3 {
			t.Errorf("more than three files: %v", files)
		}

		for _, f := range files {
			if f != "0.log" {
				seen[strings.TrimSuffix(f, ".gz")] = true
			}
		}
	}

	files := logFiles(t, dir)
	if len(seen) < 3 || len(files) != 3 || !strings.HasSuffix(files[1], ".gz") {
		t.Errorf("rotated %d times, files at the end: %v", len(seen), files)
	}

	log, err := os.ReadFile(filepath.Join(k.engine.Dir, "kubelet.log"))
	if err != nil {
		t.Fatal(err)
	}

	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, "reopen container log") || strings.Contains(line, "rotate log") {
			t.Errorf("the kubelet logged: %s", line)
		}
	}
}

// follow reads a log's numbered lines until the last.
func (k *kubelet) follow(ctx context.Context, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://127.0.0.1:10250"+path, nil)
	if err != nil {
		return err
	}

	c := http.Client{Transport: k.client.Transport} // without a timeout
	r, err := c.Do(req)
	if err != nil {
		return err
	}
	defer r.Body.Close()

	want := 1
	for s := bufio.NewScanner(r.Body); want <= chattyLines; want++ {
		if !s.Scan() {
			return fmt.Errorf("the log ends before line %d: %w", want, s.Err())
		}
		if number, _, _ := strings.Cut(s.Text(), " "); number != strconv.Itoa(want) {
			return fmt.Errorf("line %.40q instead of %d", s.Text(), want)
		}
	}

	return nil
}

// logFiles returns the sorted names of a container's logs, without temporary files of the
// compression.
func logFiles(t *testing.T, dir string) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}

	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".tmp") {
			out = append(out, e.Name())
		}
	}

	return out
}
