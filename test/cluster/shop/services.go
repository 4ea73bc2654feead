package main

import (
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

// service answers GET and POST requests with the text that a function returns.
func service(respond func(r *http.Request) (string, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, err := respond(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		fmt.Fprint(w, text)
	})
}

// catalog lists the products, one per line.
func catalog() http.Handler {
	return service(func(*http.Request) (string, error) { return "coffee\ntea\n", nil })
}

// prices returns the price of a product.
func prices() http.Handler {
	return service(func(r *http.Request) (string, error) {
		price, ok := map[string]string{"coffee": "7", "tea": "4"}[r.URL.Query().Get("product")]
		if !ok {
			return "", fmt.Errorf("no such product %q", r.URL.Query().Get("product"))
		}
		return price, nil
	})
}

// initialStock is the number of pieces of a product before the first order.
const initialStock = 100

// stock returns the remaining number of a product.
func stock() http.Handler {
	return service(func(r *http.Request) (string, error) {
		sold, err := call(http.MethodGet, "http://store/"+r.URL.Query().Get("product"))
		if err != nil {
			return "", err
		}

		n, err := strconv.Atoi(sold)

		return strconv.Itoa(initialStock - n), err
	})
}

// orders stores an order (POST), or returns the number of orders of a product (GET).
func orders() http.Handler {
	return service(func(r *http.Request) (string, error) {
		product := r.URL.Query().Get("product")
		if r.Method == http.MethodGet {
			return call(http.MethodGet, "http://store/"+product)
		}

		left, err := call(http.MethodGet, "http://stock/?product="+product)
		if err != nil {
			return "", err
		}
		if left == "0" {
			return "", fmt.Errorf("%s is sold out", product)
		}

		return call(http.MethodPost, "http://store/"+product)
	})
}

// front is the page of the shop. A POST with a product orders it.
func front() http.Handler {
	return service(func(r *http.Request) (string, error) {
		if r.Method == http.MethodPost {
			_, err := call(http.MethodPost, "http://orders/?product="+r.URL.Query().Get("product"))
			return "thank you\n", err
		}

		products, err := call(http.MethodGet, "http://catalog/")
		if err != nil {
			return "", err
		}

		page := ""
		for _, p := range strings.Fields(products) {
			line := []any{p}
			for _, name := range []string{"prices", "stock", "orders"} {
				answer, err := call(http.MethodGet, "http://"+name+"/?product="+p)
				if err != nil {
					return "", err
				}
				line = append(line, answer)
			}

			page += fmt.Sprintf("%s: price %s, stock %s, orders %s\n", line...)
		}

		return page, nil
	})
}

// web names its pod, its VERSION and the client's address. burn=DURATION uses a processor.
func web() http.Handler {
	host, _ := os.Hostname()
	return service(func(r *http.Request) (string, error) {
		if d, err := time.ParseDuration(r.URL.Query().Get("burn")); err == nil {
			for end := time.Now().Add(min(d, time.Second)); time.Now().Before(end); {
			}
		}

		return fmt.Sprintf("%s %q %s\n", host, os.Getenv("VERSION"), r.RemoteAddr), nil
	})
}
