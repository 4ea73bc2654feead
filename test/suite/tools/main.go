// Command tools replaces tools of the suite's images missing in busybox: curl (only GET of the last
// argument), bash (runs sh), dig and getent (with the suite's arguments), and nc with the option -t
// (TCP, the default). The name of the program selects the tool.
package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	if err := run(filepath.Base(os.Args[0]), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(name string, args []string) error {
	switch name {
	case "curl":
		return get(args[len(args)-1])
	case "bash":
		return syscall.Exec("/bin/sh", append([]string{"sh"}, args...), os.Environ())
	case "nc":
		isTCP := func(arg string) bool { return arg == "-t" }
		return syscall.Exec("/bin/busybox", append([]string{"nc"}, slices.DeleteFunc(args, isTCP)...), os.Environ())
	case "dig":
		return dig(args)
	case "getent":
		return getent(args)
	}

	return fmt.Errorf("%s: unknown tool", name)
}

// get prints a page. Like curl, it completes a URL without a scheme.
func get(url string) error {
	if !strings.Contains(url, "://") {
		url = "http://" + url
	}

	config := &tls.Config{InsecureSkipVerify: true} //nolint:gosec // like the suite
	c := http.Client{Timeout: 15 * time.Second, Transport: &http.Transport{TLSClientConfig: config}}

	r, err := c.Get(url)
	if err != nil {
		return err
	}
	defer r.Body.Close()

	_, err = io.Copy(os.Stdout, r.Body)

	return err
}
